"""Answers in HELM's request cache, read and written in bulk."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, cast

from helm.common.cache import (
    BlackHoleCacheConfig,
    CacheConfig,
    KeyValueStoreCacheConfig,
    SqliteCacheConfig,
    cache_stats,
    create_key_value_store,
)
from helm.common.key_value_store import request_to_key
from sqlitedict import SqliteDict

from flexgen_helm.helm.requests import Response

Key = Mapping[str, Any]


class ResponseCache:
    """The cache that HELM configured for a deployment, without its connection per request.

    HELM opens a connection for every request and keeps it open while the answer is computed. Concurrent writers of one
    SQLite file then fail with "database is locked" and wait for seconds. Here a connection lives for one bulk read or
    one bulk write, and one of them at a time.
    """

    def __init__(self, config: CacheConfig, lock: threading.Lock) -> None:
        """Args: config: HELM's cache of the deployment. lock: Shared by all that use the same file in this process."""
        if not isinstance(config, KeyValueStoreCacheConfig):
            raise TypeError(f"HELM's cache is of an unknown kind: {config!r}")
        self._config = config
        self._lock = lock

    @property
    def disabled(self) -> bool:
        """Whether HELM was told to cache nothing."""
        return isinstance(self._config, BlackHoleCacheConfig)

    def lookup(self, keys: Iterable[Key]) -> list[Response | None]:
        """Return the stored answer of each key, or None, in the order of the keys."""
        keys = list(keys)
        if self.disabled or not keys:
            return [None] * len(keys)
        with self._lock, create_key_value_store(self._config) as store:
            found = [cast("Response | None", store.get(key)) for key in keys]
        for response in found:
            cache_stats.increment_query(self._config.cache_stats_key)
            if response is None:
                cache_stats.increment_compute(self._config.cache_stats_key)
        return found

    def write(self, items: Iterable[tuple[Key, Response]]) -> None:
        """Store all answers; for SQLite in one transaction."""
        items = list(items)
        if self.disabled or not items:
            return
        with self._lock:
            if isinstance(self._config, SqliteCacheConfig):
                # The table that HELM's SqliteKeyValueStore uses, which commits after every row.
                with SqliteDict(self._config.path) as table:
                    table.update((request_to_key(key), response) for key, response in items)
                    table.commit()
            else:
                with create_key_value_store(self._config) as store:
                    store.multi_put(items)

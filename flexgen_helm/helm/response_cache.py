"""Answers in HELM's request cache, read and written in bulk."""

from __future__ import annotations

import json
import pickle
import sqlite3
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from helm.common.cache import (
    BlackHoleCacheConfig,
    CacheConfig,
    KeyValueStoreCacheConfig,
    SqliteCacheConfig,
    cache_stats,
    create_key_value_store,
)

from flexgen_helm.helm.disk_errors import clear_disk_errors
from flexgen_helm.helm.requests import Response, checked

Item = tuple[str, Response]
CHECKSUM = b"crc32:"
"""Stands between an answer and its checksum."""
LOCK_SECONDS = 60.0
"""How long to wait for another process that writes to the same file."""


class _Store(Protocol):
    def get(self, keys: Sequence[str]) -> list[Response | None]: ...

    def put(self, items: Sequence[Item]) -> None: ...

    def close(self) -> None: ...


class ResponseCache:
    """The cache that HELM configured for a deployment, without its connection per request.

    HELM opens a connection for every request and keeps it open while the answer is computed; concurrent writers of one
    SQLite file then fail with "database is locked" and wait for seconds. Here one connection serves a whole process,
    and what several threads have to write at a time is one transaction. Keys are those of HELM's stores: JSON.
    """

    def __init__(self, config: CacheConfig) -> None:
        """Args: config: HELM's cache of the deployment.

        Raises:
            FlexGenError: The file cannot be opened or is no SQLite file.
        """
        if not isinstance(config, KeyValueStoreCacheConfig):
            raise TypeError(f"HELM's cache is of an unknown kind: {config!r}")
        self._stats_key = config.cache_stats_key
        self._store = _open(config)
        self._lock = threading.Lock()
        self._waiting: deque[Item] = deque()

    def lookup(self, keys: Sequence[str]) -> list[Response | None]:
        """Return the stored answer of each key, or None, in the order of the keys."""
        with self._lock:
            found = [checked(response) for response in self._store.get(keys)]
        for response in found:
            cache_stats.increment_query(self._stats_key)
            if response is None:
                cache_stats.increment_compute(self._stats_key)
        return found

    def write(self, items: Iterable[Item]) -> None:
        """Store answers; they are durable when this returns.

        Raises:
            DiskFull: There is no space left.
            FlexGenError: The file cannot be written for another reason.
        """
        self._waiting.extend(items)
        with self._lock:
            # Whoever comes first writes for all who wait.
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            try:
                self._store.put(batch)
            except BaseException:
                self._waiting.extendleft(reversed(batch))
                raise

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._store.close()


class ResponseCaches:
    """The caches of a process, each of them opened once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._caches: dict[CacheConfig, ResponseCache] = {}

    def get(self, config: CacheConfig) -> ResponseCache:
        """Return the cache with this configuration."""
        with self._lock:
            if config not in self._caches:
                self._caches[config] = ResponseCache(config)
            return self._caches[config]

    def close(self) -> None:
        """Close all."""
        with self._lock:
            for cache in self._caches.values():
                cache.close()
            self._caches.clear()


def _open(config: KeyValueStoreCacheConfig) -> _Store:
    if isinstance(config, SqliteCacheConfig):
        return _SqliteStore(config.path)
    if isinstance(config, BlackHoleCacheConfig):
        return _NoStore()
    return _HelmStore(config)


class _SqliteStore:
    """The table that HELM's own SqliteKeyValueStore (the library sqlitedict) makes and reads."""

    def __init__(self, path: str) -> None:
        self._path = path
        with clear_disk_errors(path):
            self._connection = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False)
            with self._connection:
                self._connection.execute('CREATE TABLE IF NOT EXISTS "unnamed" (key TEXT PRIMARY KEY, value BLOB)')

    def get(self, keys: Sequence[str]) -> list[Response | None]:
        with clear_disk_errors(self._path):
            select = 'SELECT value FROM "unnamed" WHERE key = ?'
            rows = [self._connection.execute(select, (key,)).fetchone() for key in keys]
        return [None if row is None else _unpickled(key, row[0]) for key, row in zip(keys, rows, strict=True)]

    def put(self, items: Sequence[Item]) -> None:
        if not items:
            return
        rows = [(key, _pickled(key, response)) for key, response in items]
        with clear_disk_errors(self._path), self._connection:
            self._connection.executemany('REPLACE INTO "unnamed" (key, value) VALUES (?, ?)', rows)

    def close(self) -> None:
        self._connection.close()


def _pickled(key: str, response: Response) -> bytes:
    """Return an answer as HELM's store reads it, with a checksum behind it, which unpickling leaves alone.

    SQLite has no checksums: a changed byte may change an answer, or the place at which that of a key is looked for.
    """
    value = pickle.dumps(response)
    return value + CHECKSUM + b"%08x" % _checksum(key, value)


def _unpickled(key: str, value: object) -> Response | None:
    """Return a stored answer, None for one that is damaged: it is computed and written again.

    One without a checksum was written by an earlier version, and is taken as it is.
    """
    try:
        pickled, mark, checksum = value.rpartition(CHECKSUM)  # type: ignore[attr-defined]  # whatever the file holds
        if mark and checksum != b"%08x" % _checksum(key, pickled):
            return None
        response: Response = pickle.loads(pickled if mark else value)  # type: ignore[arg-type]
    except Exception:  # whatever the damage makes of the bytes
        return None
    return response


def _checksum(key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key.encode()))


class _NoStore:
    """With ``--disable-cache``."""

    def get(self, keys: Sequence[str]) -> list[Response | None]:
        return [None] * len(keys)

    def put(self, items: Sequence[Item]) -> None: ...

    def close(self) -> None: ...


class _HelmStore:
    """A server, which HELM connects to."""

    def __init__(self, config: KeyValueStoreCacheConfig) -> None:
        self._config = config

    def get(self, keys: Sequence[str]) -> list[Response | None]:
        with create_key_value_store(self._config) as store:
            return [store.get(json.loads(key)) for key in keys]

    def put(self, items: Sequence[Item]) -> None:
        with create_key_value_store(self._config) as store:
            store.multi_put((json.loads(key), response) for key, response in items)

    def close(self) -> None: ...

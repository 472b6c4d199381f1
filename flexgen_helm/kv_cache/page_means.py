"""Means of V of sealed pages: on the device, or on the host where the CPU attends beside it, whatever tier the pages are on."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_helm.kv_cache.page_format import CacheKey, MeanPart
from flexgen_helm.kv_cache.page_stores import GrowingPages
from flexgen_helm.kv_cache.pages import PageCounts, PageMap, PagePool, PageStorage, Place
from flexgen_helm.types import TIERS


class PageMeans:
    """A mean for each page that is kept on any tier, numbered through all tiers, and for each transient page."""

    def __init__(self, pool: PagePool | None, page_map: PageMap, *, grows: bool) -> None:
        """Allocate nothing yet.

        Args:
            pool: The pages; None: a device without bound.
            page_map: Which tier each page has.
            grows: See `flexgen_helm.kv_cache.page_stores.GrowingPages`.
        """
        self._pool, self._page_map = pool, page_map
        self._kept, self._transient = (
            GrowingPages(None if pool is None else sum(pool.capacities), grows=grows),
            GrowingPages(None),
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors when all their pages are in use."""
        return self._kept.num_bytes + self._transient.num_bytes

    def first(self, place: Place) -> int:
        """The number of the mean of a tier's first page; numbers change only while no page is in use."""
        return self._pool.limits.first("host") if place == "host" and self._pool is not None else 0

    def numbers(self, pages: list[int]) -> list[int]:
        """The numbers of the means of kept pages."""
        limits = PageCounts(0) if self._pool is None else self._pool.limits
        return [limits.first(self._page_map.tier_of(page)) + self._page_map.index(page) for page in pages]

    def reserve(self, storage: PageStorage) -> None:
        """Make room for the means of so many pages; tensors follow at their next use."""
        kept, limit = storage.kept.device, None
        if self._pool is not None:
            limits = self._pool.limits
            limit = sum(limits)
            ends = [limits.first(tier) + count for tier, count in zip(TIERS, storage.kept, strict=True) if count]
            kept = max(ends, default=0)
        self._kept.reserve(kept, limit)
        self._transient.reserve(storage.transient)

    def tensor(self, key: CacheKey, part: MeanPart, place: Place, device: torch.device) -> Tensor:
        """The means ``[n, num_heads, dim]`` for the pages of one attention call at a place, on a device."""
        if place == "transient":
            return self._transient.tensor(CacheKey(-1, key.call), "mean", part, device)
        return self._kept.tensor(key, "mean", part, device)

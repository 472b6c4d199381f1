"""Accounting of K/V pages: which are free, and on which tier. `flexgen_helm.memory.paged_cache` holds their tensors."""

from __future__ import annotations

from typing import NamedTuple

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.types import TIERS, Shares, Tier

PAGE_TOKENS = 32
"""Tokens in a page, by absolute position (docs/architecture.md)."""


def num_pages(start: int, end: int) -> int:
    """Number of pages that positions ``[start, end)`` touch."""
    return 0 if end <= start else (end - 1) // PAGE_TOKENS - start // PAGE_TOKENS + 1


class PageCounts(NamedTuple):
    """So many pages on each tier. As capacities they are ranges of page numbers too: device first, then host, then disk."""

    device: int
    host: int = 0
    disk: int = 0

    def tier_of(self, page: int) -> Tier:
        """Where a page lies."""
        return "device" if page < self.device else "host" if page < self.device + self.host else "disk"

    def first(self, tier: Tier) -> int:
        """The lowest page number of a tier."""
        return sum(self[: TIERS.index(tier)])


class _TierPages:
    """Page numbers of one tier, lowest first as far as they have been handed out."""

    def __init__(self, first: int, capacity: int) -> None:
        self.first, self.capacity = first, capacity
        self.high_water = 0
        self.free: list[int] = []

    @property
    def num_free(self) -> int:
        return self.capacity - self.num_used

    @property
    def num_used(self) -> int:
        return self.high_water - len(self.free)

    def allocate(self, count: int) -> list[int]:
        reused = [self.free.pop() for _ in range(min(count, len(self.free)))]
        begin = self.first + self.high_water
        self.high_water += count - len(reused)
        return reused + list(range(begin, self.first + self.high_water))


class PagePool:
    """Hands out page numbers. Pages that are asked for together lie on one tier as long as there is room."""

    def __init__(
        self, capacity: int, *, host: int = 0, disk: int = 0, shares: Shares = (1.0, 0.0, 0.0), page_bytes: int = 1
    ) -> None:
        """Nothing is allocated.

        Args:
            capacity: Pages on the device.
            host: Pages in host memory.
            disk: Pages on disk.
            shares: Of the pages in use on each tier, as far as there is room; a full tier's share goes to the others.
            page_bytes: K and V of a page in all layers.
        """
        self.capacities, self.page_bytes = PageCounts(capacity, host, disk), page_bytes
        self._shares = dict(zip(TIERS, shares, strict=True))
        self._tiers = {
            tier: _TierPages(self.capacities.first(tier), count) for tier, count in zip(TIERS, self.capacities, strict=True)
        }

    @property
    def capacity(self) -> int:
        """Pages on all tiers."""
        return sum(self.capacities)

    @property
    def num_free(self) -> int:
        """Pages that may still be taken, on any tier."""
        return self.capacity - self.num_used

    @property
    def num_used(self) -> int:
        """Pages that are taken."""
        return sum(pages.num_used for pages in self._tiers.values())

    @property
    def used(self) -> PageCounts:
        """Pages that are taken on each tier."""
        return PageCounts(*(pages.num_used for pages in self._tiers.values()))

    @property
    def high_water(self) -> PageCounts:
        """Pages that storage must have on each tier."""
        return PageCounts(*(pages.high_water for pages in self._tiers.values()))

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages: on the tier that is furthest below its share and has room, or spread over several.

        Raises:
            OutOfSpace: If fewer are free; admission asks `num_free` first, so this is not reached from a user's job.
        """
        if count > self.num_free:
            raise OutOfSpace(f"{count} K/V pages were asked for, {self.num_free} of {self.capacity} are free")
        total = self.num_used + count
        order = sorted(TIERS, key=lambda tier: self._tiers[tier].num_used - self._shares[tier] * total)
        order.sort(key=lambda tier: self._tiers[tier].num_free < count)
        pages: list[int] = []
        for tier in order:
            pages += self._tiers[tier].allocate(min(count - len(pages), self._tiers[tier].num_free))
        return pages

    def release(self, pages: list[int]) -> None:
        """Give pages back."""
        for page in reversed(pages):
            self._tiers[self.capacities.tier_of(page)].free.append(page)

"""Accounting of K/V pages by their numbers, without tensors: which are free, on which tier each is, and in which slot.

Kept pages are numbered from 0 on. The numbers of transient pages are below 0: the first is -1, see `transient_page`.

`PagePool` hands numbers out, `PageMap` tells tiers, `Residency` tells slots. `flexgen_helm.kv_cache.paged_cache` holds the
tensors. A scheduler and a simulator need only what is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.types import TIERS, Shares, Tier

PAGE_TOKENS = 32
"""Tokens in a page, by absolute position (docs/architecture.md)."""
CHUNK_TOKENS = 128
"""Keys in a chunk, by absolute position: attention works in chunks of this size."""
CHUNK_PAGES = CHUNK_TOKENS // PAGE_TOKENS
TRANSFER_BYTES = 8 << 20
"""Pages travel together up to this many bytes."""
GROWTH = 1.5
"""Storage that is too small is made larger by at least this factor, since growing copies what is stored."""
NUM_BUFFERS = 3
"""Buffers through which pages pass: one is filled, one travels, one is emptied."""


Place = Literal["transient", "device", "host", "staged"]
"""The place where attention reads a page: among the layer's transient pages, kept on the device or the host, or in a slot."""

Form = Literal["exact", "sealed"]
"""The form in which a query reads a chunk: its own chunk exact, every earlier one sealed where the cache compresses K or V."""


def transient_page(index: int) -> int:
    """Number of a transient page, -1 for index 0; the same turns the number into the index."""
    return ~index


def num_pages(start: int, end: int) -> int:
    """Number of pages that positions ``[start, end)`` touch."""
    return 0 if end <= start else (end - 1) // PAGE_TOKENS - start // PAGE_TOKENS + 1


class PageCounts(NamedTuple):
    """Pages on each tier. As capacities they are ranges of page numbers too: device first, then host, then disk."""

    device: int
    host: int = 0
    disk: int = 0

    def tier_of(self, page: int) -> Tier:
        """The tier that stores a page."""
        return "device" if page < self.device else "host" if page < self.device + self.host else "disk"

    def is_staged(self, own_memory: bool) -> bool:
        """Whether attention cannot read some pages in place; ``own_memory`` as in `PageMap`."""
        return self.disk > 0 or (self.host > 0 and own_memory)

    def first(self, tier: Tier) -> int:
        """The lowest page number of a tier."""
        return sum(self[: TIERS.index(tier)])


@dataclass(frozen=True)
class Lane:
    """One of several schedulers that divide pages evenly; their sweeps follow each other through the stages of a pipeline."""

    index: int = 0
    count: int = 1


ONE_LANE = Lane()
"""The lane of a scheduler that has all pages."""


class _TierPages:
    """Page numbers of one tier, lowest first as far as they have been handed out. Lanes take turns, so that few are skipped."""

    def __init__(self, first: int, capacity: int, lane: Lane) -> None:
        self._first, self._lane = first + lane.index, lane
        self.capacity = capacity // lane.count
        self.resize(self.capacity)

    def resize(self, limit: int) -> None:
        self.limit, self._handed_out = limit, 0
        self.free: list[int] = []

    @property
    def num_free(self) -> int:
        return self.limit - self.num_used

    @property
    def num_used(self) -> int:
        return self._handed_out - len(self.free)

    @property
    def high_water(self) -> int:
        return (self._handed_out - 1) * self._lane.count + self._lane.index + 1 if self._handed_out else 0

    def allocate(self, count: int) -> list[int]:
        reused = [self.free.pop() for _ in range(min(count, len(self.free)))]
        fresh = range(self._handed_out, self._handed_out + count - len(reused))
        self._handed_out = fresh.stop
        return reused + [self._first + self._lane.count * index for index in fresh]


class PagePool:
    """Hands out page numbers. Pages that are asked for together lie on one tier as long as there is room."""

    def __init__(
        self,
        capacity: int,
        *,
        host: int = 0,
        disk: int = 0,
        shares: Shares = (1.0, 0.0, 0.0),
        page_bytes: int = 1,
        lane: Lane = ONE_LANE,
    ) -> None:
        """Nothing is allocated.

        Args:
            capacity: Pages on the device, of all lanes; the same for the others.
            host: Pages in host memory.
            disk: Pages on disk.
            shares: Of the pages in use on each tier, as far as there is room; a full tier's share goes to the others.
            page_bytes: Bytes of K and V of a page in all layers.
            lane: The lane whose pages are handed out.
        """
        self.capacities, self.page_bytes = PageCounts(capacity, host, disk), page_bytes
        self._shares = dict(zip(TIERS, shares, strict=True))
        self._share = 1.0
        self._tiers = {
            tier: _TierPages(self.capacities.first(tier), count, lane)
            for tier, count in zip(TIERS, self.capacities, strict=True)
        }

    def of_lane(self, lane: Lane) -> PagePool:
        """Return a pool that hands out the pages of one lane, as long as this one hands out none."""
        pool = self.resized(self.capacities, lane)
        pool.resize(self._share)
        return pool

    def resized(self, capacities: PageCounts, lane: Lane = ONE_LANE) -> PagePool:
        """Return a pool with other numbers of pages on the tiers, of which none are taken."""
        shares = (self._shares["device"], self._shares["host"], self._shares["disk"])
        on_device, host, disk = capacities
        return PagePool(on_device, host=host, disk=disk, shares=shares, page_bytes=self.page_bytes, lane=lane)

    @property
    def most(self) -> PageCounts:
        """Pages of each tier that may be taken if other forms take none."""
        return PageCounts(*(pages.capacity for pages in self._tiers.values()))

    @property
    def limits(self) -> PageCounts:
        """Pages that may be taken on each tier."""
        return PageCounts(*(pages.limit for pages in self._tiers.values()))

    def resize(self, share: float) -> None:
        """Hand out no more than a share of the capacity of each tier; no page may be taken.

        Args:
            share: From 0 to 1. Pages of another form take the rest of the bytes.
        """
        assert not self.num_used, "pages that are taken cannot lose their storage"
        self._share = share
        for pages in self._tiers.values():
            pages.resize(int(share * pages.capacity))

    @property
    def capacity(self) -> int:
        """Pages on all tiers."""
        return sum(self.limits)

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


@dataclass(frozen=True)
class PageMap:
    """The tier and place of every page, from its number alone.

    Attributes:
        capacities: Pages of each tier; None: every page is on the device.
        own_memory: Whether the device has a memory of its own, so that attention cannot read host pages in place.
    """

    capacities: PageCounts | None = None
    own_memory: bool = False

    def tier_of(self, page: int) -> Tier:
        """The tier that stores a kept page."""
        return "device" if self.capacities is None else self.capacities.tier_of(page)

    def place(self, page: int) -> Place:
        """The place where attention reads a page."""
        return "transient" if page < 0 else self.place_of_tier(self.tier_of(page))

    def place_of_tier(self, tier: Tier) -> Place:
        """The place where attention reads kept pages of a tier."""
        return "staged" if tier == "disk" or (tier == "host" and self.own_memory) else tier

    def index(self, page: int) -> int:
        """The number of a page among those of its tier, or among the transient ones, from 0."""
        if page < 0:
            return transient_page(page)
        return page if self.capacities is None else page - self.capacities.first(self.capacities.tier_of(page))


def grown(have: int, wanted: int, limit: int | None) -> int:
    """Return the size of storage that grows where more is wanted than there is, to a limit at most."""
    if wanted <= have:
        return have
    size = max(wanted, int(GROWTH * have))
    return size if limit is None else min(size, limit)


class PageStorage(NamedTuple):
    """Storage of pages of one form."""

    kept: PageCounts = PageCounts(0)
    """One more than the highest number in use on each tier, among the tier's own."""
    transient: int = 0
    """Likewise of transient pages."""


class StagedPages(NamedTuple):
    """Pages that a row touches and attention cannot read where they are stored."""

    pages: list[int]
    """Their numbers, without repetition."""
    reads: frozenset[int]
    """Those that hold something when the row comes."""
    writes: frozenset[int]
    """Those that the row writes into."""


class SlotPlan(NamedTuple):
    """The slots of a row's staged pages."""

    slots: list[int]
    """The slot of each of `StagedPages.pages`."""
    missing: dict[int, int]
    """Page to slot, for the pages whose content must be brought."""
    fresh: list[int]
    """The slots that had no page."""
    is_partial: bool
    """Whether another row brought some of the pages without their V, of which it may have brought some rows since."""


@dataclass(eq=False)
class _Resident:
    slot: int
    whole: bool
    """Whether its V comes or is written as a whole."""
    users: int = 0
    written: bool = False


class Residency:
    """Which staged pages are in which slot, and which loaded rows still need them.

    A slot holds one page of one layer. A page that several loaded rows of a layer touch has one slot: it is missing for the
    first of them only, and leaves after the last of them.
    """

    def __init__(self) -> None:
        """There are no slots yet."""
        self._resident: dict[tuple[int, int], _Resident] = {}
        self._free: list[int] = []

    def reset(self, num_slots: int) -> None:
        """Forget all pages and have slots ``0 .. num_slots - 1``."""
        self._resident.clear()
        self._free = list(range(num_slots))[::-1]

    def load(self, j: int, staged: StagedPages, *, values: bool = True) -> SlotPlan:
        """Give each of a row's pages of layer j a slot, or the one that it has already.

        Args:
            j: The layer.
            staged: The pages.
            values: Whether V of the missing pages comes with K.
        """
        slots: list[int] = []
        fresh: list[int] = []
        missing: dict[int, int] = {}
        is_partial = False
        for page in staged.pages:
            resident = self._resident.get((j, page))
            if resident is None:
                resident = self._resident[j, page] = _Resident(self._free.pop(), values or page not in staged.reads)
                fresh.append(resident.slot)
                if page in staged.reads:
                    missing[page] = resident.slot
            is_partial |= not resident.whole
            resident.users += 1
            slots.append(resident.slot)
        return SlotPlan(slots, missing, fresh, is_partial)

    def release(self, j: int, staged: StagedPages) -> dict[int, int]:
        """Take back the slots of the pages that no other loaded row of layer j needs.

        Returns:
            Page to slot, for those of them that were written and must be stored before their slot is filled again.
        """
        leaving: dict[int, int] = {}
        for page in staged.pages:
            resident = self._resident[j, page]
            resident.users -= 1
            resident.written |= page in staged.writes
            if not resident.users:
                del self._resident[j, page]
                self._free.append(resident.slot)
                if resident.written:
                    leaving[page] = resident.slot
        return leaving

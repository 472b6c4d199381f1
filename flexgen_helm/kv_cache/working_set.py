"""Transfers of pages that are stored on the host or on disk, to and from slots on the device.

A row's pages are loaded before it attends and written back once no loaded row needs them; `Residency` says which. All transfers
run in one thread, in the order in which they were asked for: a page is never read before it was written, and a slot never
filled before it was emptied. V of sealed pages may come later than K, row by row (`bring_values`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_helm.kv_cache.cargo import INDEX_BYTES, Cargo, HeldRows, ValueRows, as_rows
from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat, PageTensors, PartName
from flexgen_helm.kv_cache.page_stores import OffloadedPages
from flexgen_helm.kv_cache.pages import NUM_BUFFERS, PAGE_TOKENS, TRANSFER_BYTES, PageCounts, Residency, StagedPages
from flexgen_helm.kv_cache.staging import StagingBuffer, StagingRing
from flexgen_helm.memory.copies import upload
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.link import Link, Transfer
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity
from flexgen_helm.types import Resource, Tier


class _Batch(NamedTuple):
    """Pages of one attention call that travel together."""

    cargo: Cargo
    tier: Tier
    pages: list[int]
    slots: list[int]


class _RowBatch(NamedTuple):
    """Rows of V that travel together."""

    tier: Tier
    source: ValueRows
    target: Tensor
    """``[n]``: their places in the slots, numbered in the same way."""


class _Flight(NamedTuple):
    """A batch on its way."""

    batch: _Batch
    buffer: StagingBuffer
    num_bytes: int
    begun: float


class Loaded(NamedTuple):
    """A row's pages on the device.

    Attributes:
        slots: ``[pages]``: the slot of each of `StagedPages.pages`.
        arriving: Their transfer.
        numbers: The slots as numbers on the host.
        is_partial: Whether V of some pages may be missing: see `WorkingSet.bring_values`.
    """

    slots: Tensor
    arriving: Transfer
    numbers: list[int]
    is_partial: bool


class WorkingSet:
    """Slots on the device, each for a page of the layer that is being computed, and the transfers that fill and empty them."""

    def __init__(
        self,
        stores: Mapping[Tier, OffloadedPages],
        capacities: PageCounts,
        device: Device,
        link: Link,
        meter: Meter,
        *,
        arena: str = "cache slots",
    ) -> None:
        """Allocate nothing yet.

        Args:
            stores: The pages of each tier that attention cannot read in place.
            capacities: Number of pages of each tier.
            device: The device that computes attention and has the slots.
            link: Moves pages; whoever made it closes it.
            meter: Counts the bytes that are moved and held.
            arena: What the meter calls the slots.
        """
        self._stores, self._capacities, self._meter = stores, capacities, meter
        self._device, self._own_memory = device.torch_device, device.own_memory
        self._link, self._arena = link, arena
        self._ring = StagingRing(device)
        self._formats: dict[CacheKey, PageFormat] = {}
        self._slots: dict[tuple[int, PageFormat], PageTensors] = {}
        self._residency, self._held = Residency(), HeldRows()
        self._num_slots = 0
        self._last: Transfer | None = None
        self._failure: BaseException | None = None
        self._failure_seen = False

    def reserve(self, slots: int) -> None:
        """Wait for all transfers, forget all pages, and have at least so many slots.

        Raises:
            OutOfSpace: Or any other error of an earlier transfer, if no `wait` has raised it.
        """
        failure = self._drain()
        if slots > self._num_slots:
            self._num_slots = slots
            self._slots.clear()
            self._held.clear()
        self._residency.reset(self._num_slots)
        if failure is not None:
            raise failure

    def register(self, key: CacheKey, page_format: PageFormat) -> None:
        """Make room for an attention call in all stores."""
        self._formats[key] = page_format
        for store in self._stores.values():
            store.register(key, page_format)

    def tensors(self, key: CacheKey, page_format: PageFormat) -> PageTensors:
        """The slots as an attention call sees them."""
        if (key.call, page_format) not in self._slots:
            self._slots[key.call, page_format] = page_format.allocate(self._num_slots, self._device)
            if page_format.is_apart:
                self._held.register(key.call, page_format, self._num_slots)
            held = sum(slots.num_bytes for slots in self._slots.values())
            self._meter.hold("device", self._arena, held)
        return self._slots[key.call, page_format]

    def load(self, j: int, staged: StagedPages, *, values: bool = True) -> Loaded:
        """Start to bring a row's pages of layer j. The caller waits before it uses them, and releases them after.

        A page that an earlier row loaded and nobody released yet is not brought again.

        Args:
            j: The layer.
            staged: The pages.
            values: Whether V comes with K; if not, `bring_values` brings what is read of it.
        """
        for key, page_format in self._calls(j):  # stores grow now: no transfer of this layer is under way since `reserve`
            self.register(key, page_format)
        slots, missing, fresh, is_partial = self._residency.load(j, staged, values=values)
        batches = list(self._batches(j, missing, ("k", "v") if values else ("k",)))
        self._held.set(fresh, whole=True)
        if not values:
            self._held.set(list(missing.values()), whole=False)
        # Also where nothing is read: what leaves the slots must be gone before the row fills them.
        self._submit(lambda: self._bring(batches, Activity("load_cache", str(j))))
        assert self._last is not None
        return Loaded(upload(slots, self._device), self._last, slots, is_partial)

    def wait(self, loaded: Loaded) -> None:
        """Let the computation that follows see a row's pages.

        Raises:
            OutOfSpace: Or any other error of this or an earlier transfer.
        """
        self._wait(loaded.arriving)

    def bring_values(self, key: CacheKey, staged: StagedPages, loaded: Loaded, wanted: Tensor | None = None) -> None:
        """Bring rows of V that the slots of a row's pages do not hold, and let the computation that follows see them.

        Rows that nobody wanted are those of pages that had the slot before: finite numbers, which a weight of 0 hides.

        Args:
            key: The attention call.
            staged: The row's pages.
            loaded: What `load` returned for them.
            wanted: bool ``[pages, num_heads, 32]`` on the host: what is read. None: all rows.

        Raises:
            OutOfSpace: Or any other error of this or an earlier transfer.
        """
        missing = self._held.take_missing(key.call, self._formats[key], loaded.numbers, wanted)
        batches = list(self._row_batches(key, staged.pages, loaded.numbers, missing)) if bool(missing.any()) else []
        if batches:
            self._submit(lambda: self._bring_rows(batches, Activity("load_cache", str(key.layer))))
            assert self._last is not None
            self._wait(self._last)

    def release(self, j: int, staged: StagedPages) -> Transfer | None:
        """Start to write back the pages that a row of layer j has written, once no other loaded row needs them.

        Returns:
            The transfer; None: nothing is to be written.
        """
        leaving = self._residency.release(j, staged)
        batches = list(self._batches(j, leaving))
        if batches:
            self._submit(lambda: self._take_away(batches, Activity("store_cache", str(j))))
        return self._last if batches else None

    def close(self) -> None:
        """Close the stores; the link's transfers have ended."""
        for store in self._stores.values():
            store.close()

    def _wait(self, transfer: Transfer) -> None:
        try:
            with self._meter.waiting():
                transfer.wait()
        except BaseException:
            self._failure_seen = True
            raise

    def _submit(self, work: Callable[[], None]) -> None:
        self._last = self._link.submit(lambda: self._run(work))

    def _run(self, work: Callable[[], None]) -> None:
        """Do some work unless earlier work failed: it may need the pages that were lost."""
        if self._failure is not None:
            raise self._failure
        try:
            work()
        except BaseException as error:
            self._failure = error
            self._ring.abandon()
            raise

    def _drain(self) -> BaseException | None:
        """Wait for all transfers; returns their error, unless a `wait` has raised it."""
        if self._last is not None:
            with suppress(BaseException):  # it is in _failure
                self._last.wait()
        unheard = None if self._failure_seen else self._failure
        self._failure, self._failure_seen, self._last = None, False, None
        return unheard

    def _calls(self, j: int) -> list[tuple[CacheKey, PageFormat]]:
        return [call for call in self._formats.items() if call[0].layer == j]

    def _batches(self, j: int, places: Mapping[int, int], names: tuple[PartName, ...] = ("k", "v")) -> Iterator[_Batch]:
        """Sort pages of layer j, given with their slots, by tier and number, so that neighbours travel together."""
        by_tier: dict[Tier, list[int]] = {tier: [] for tier in self._stores}
        for page in sorted(places):
            by_tier[self._capacities.tier_of(page)].append(page)
        for key, page_format in self._calls(j):
            self.tensors(key, page_format)
            cargo = Cargo(key, page_format, names)
            for tier, pages in by_tier.items():
                size = max(1, TRANSFER_BYTES // self._stores[tier].transfer_bytes(cargo))
                for part in (pages[i : i + size] for i in range(0, len(pages), size)):
                    indices = [page - self._capacities.first(tier) for page in part]
                    yield _Batch(cargo, tier, indices, [places[page] for page in part])

    def _row_batches(self, key: CacheKey, pages: list[int], slots: list[int], missing: Tensor) -> Iterator[_RowBatch]:
        """Sort rows of V ``[pages, num_heads, 32]`` by tier and page."""
        num_heads = missing.shape[1]
        for tier in self._stores:
            order = [i for i in sorted(range(len(pages)), key=pages.__getitem__) if self._capacities.tier_of(pages[i]) == tier]
            which, heads, tokens = missing[order].nonzero(as_tuple=True)
            first = self._capacities.first(tier)
            sources, targets = (
                (torch.tensor(numbers, dtype=torch.long)[which] * num_heads + heads) * PAGE_TOKENS + tokens
                for numbers in ([pages[i] - first for i in order], [slots[i] for i in order])
            )
            size = max(1, TRANSFER_BYTES // (ValueRows(key, self._formats[key], sources).row_bytes + INDEX_BYTES))
            for source, target in zip(sources.split(size), targets.split(size), strict=True):
                if len(source):
                    yield _RowBatch(tier, ValueRows(key, self._formats[key], source), target)

    def _bring(self, batches: list[_Batch], activity: Activity) -> None:
        flights: deque[_Flight] = deque()
        for batch in batches:
            if len(flights) == NUM_BUFFERS:
                self._arrive(flights.popleft(), activity)
            flights.append(self._flight(batch))
            store, buffer = self._stores[batch.tier], flights[-1].buffer
            buffer.futures += store.read(batch.cargo, batch.pages, buffer.host)
        for flight in flights:
            self._arrive(flight, activity)

    def _arrive(self, flight: _Flight, activity: Activity) -> None:
        (cargo, tier, pages, slots), buffer = flight.batch, flight.buffer
        buffer.finish()
        if tier == "disk":
            self._meter.add("disk_read", activity, flight.begun, self._meter.now(), flight.num_bytes)
        with self._on_link("host_to_device", tier, activity, flight.num_bytes):
            buffer.to_device(flight.num_bytes)
        index = upload(slots, self._device)
        stored = self.tensors(cargo.key, cargo.page_format)
        for name, source in zip(cargo.names, self._stores[tier].view(cargo, buffer.twin, len(pages)), strict=True):
            cargo.as_words(stored.part(name)[1]).index_copy_(0, index, cargo.as_words(source))
        if "v" not in cargo.names:
            left = len(pages) * self._stores[tier].transfer_bytes(cargo._replace(names=("v",)))
            self._save(tier, left, left)

    def _bring_rows(self, batches: list[_RowBatch], activity: Activity) -> None:
        """Bring rows with their numbers: gathered on the host, scattered on the device."""
        for tier, source, target in batches:
            count, row_bytes = len(target), source.row_bytes
            numbers_end, end = count * INDEX_BYTES, count * (INDEX_BYTES + row_bytes)
            buffer, begun = self._ring.next(max(TRANSFER_BYTES, end)), self._meter.now()
            buffer.host[:numbers_end].view(torch.int32).copy_(target)
            read = self._stores[tier].read_rows(source, buffer.host[numbers_end:end].view(count, row_bytes))
            if tier == "disk":
                self._meter.add("disk_read", activity, begun, self._meter.now(), read)
            with self._on_link("host_to_device", tier, activity, end):
                buffer.to_device(end)
            self._save(tier, -read, -end)
            slots = as_rows(self.tensors(source.key, source.page_format).v, row_bytes)
            index = buffer.twin[:numbers_end].view(torch.int32).long()
            slots.index_copy_(0, index, buffer.twin[numbers_end:end].view(count, row_bytes))

    def _save(self, tier: Tier, from_disk: int, to_device: int) -> None:
        """Count bytes that did not travel because nothing reads them."""
        if tier == "disk":
            self._meter.save("disk_read", from_disk)
        if tier != "disk" or self._own_memory:
            self._meter.save("host_to_device", to_device)

    def _take_away(self, batches: list[_Batch], activity: Activity) -> None:
        flights: deque[_Flight] = deque()
        for batch in batches:
            if len(flights) == NUM_BUFFERS - 1:
                self._put_down(flights.popleft(), activity)
            flight = self._flight(batch)
            index = upload(batch.slots, self._device)
            cargo = batch.cargo
            leaving = self._stores[batch.tier].view(cargo, flight.buffer.twin, len(batch.pages))
            for source, target in zip(self.tensors(cargo.key, cargo.page_format).tensors, leaving, strict=True):
                cargo.as_words(target).copy_(cargo.as_words(source).index_select(0, index))
            with self._on_link("device_to_host", batch.tier, activity, flight.num_bytes):
                flight.buffer.to_host(flight.num_bytes)
            flights.append(flight)
        for flight in flights:
            self._put_down(flight, activity)
        self._ring.finish()

    def _put_down(self, flight: _Flight, activity: Activity) -> None:
        (cargo, tier, pages, _), buffer = flight.batch, flight.buffer
        buffer.finish()
        begun = self._meter.now()
        buffer.futures += self._stores[tier].write(cargo, pages, buffer.host)
        for future in buffer.futures[-1:]:
            future.add_done_callback(
                lambda _: self._meter.add("disk_write", activity, begun, self._meter.now(), flight.num_bytes)
            )

    def _flight(self, batch: _Batch) -> _Flight:
        page_bytes = self._stores[batch.tier].transfer_bytes(batch.cargo)
        buffer = self._ring.next(max(TRANSFER_BYTES, page_bytes))
        return _Flight(batch, buffer, page_bytes * len(batch.pages), self._meter.now())

    def _on_link(self, resource: Resource, tier: Tier, activity: Activity, num_bytes: int) -> AbstractContextManager[None]:
        """Measure a copy between host and device. Pages on disk need none where the device uses the host's memory."""
        if tier == "disk" and not self._own_memory:
            return nullcontext()
        return self._meter.span(resource, activity, num_bytes)

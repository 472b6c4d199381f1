"""Pages that rest on the host or on disk, brought to the device for the rows that touch them.

A row's pages are loaded before it attends and written back once no loaded row needs them, so that a page which several rows
of a layer touch is moved once. All transfers run in one thread, in the order in which they were asked for: a page is never
read before it was written, and a place never filled before it was emptied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexgen_helm.memory.device import Device
from flexgen_helm.memory.link import Link, Transfer
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.page_tensors import CacheKey, PageShape, PageTensors
from flexgen_helm.memory.pages import PageCounts, Residency, StagedPages
from flexgen_helm.memory.staging import NUM_BUFFERS, StagingBuffer, StagingRing
from flexgen_helm.types import Resource, Tier

TRANSFER_BYTES = 8 << 20
"""Pages travel together up to this size."""


class OffloadedPages(Protocol):
    """Where pages rest. Pages are numbered from the tier's first one here."""

    def register(self, key: CacheKey, shape: PageShape) -> None:
        """Make room for an attention call."""

    def transfer_bytes(self, shape: PageShape) -> int:
        """Bytes of a page in a transfer."""

    def view(self, shape: PageShape, buffer: Tensor, count: int) -> PageTensors:
        """The pages of a transfer in a buffer of bytes."""

    def read(self, key: CacheKey, shape: PageShape, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Start to copy pages into a buffer."""

    def write(self, key: CacheKey, shape: PageShape, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Start to copy pages out of a buffer."""

    def close(self) -> None:
        """Remove what there is."""


class _Batch(NamedTuple):
    """Pages of one attention call that travel together."""

    key: CacheKey
    shape: PageShape
    tier: Tier
    pages: list[int]
    slots: list[int]


class _Flight(NamedTuple):
    """A batch on its way."""

    batch: _Batch
    buffer: StagingBuffer
    num_bytes: int
    begun: float


class Loaded(NamedTuple):
    """A row's pages on the device."""

    slots: Tensor
    """Where each of `StagedPages.pages` is: ``[pages]``."""
    arriving: Transfer


class WorkingSet:
    """Slots on the device, each for one page of whatever layer is being computed."""

    def __init__(self, stores: Mapping[Tier, OffloadedPages], capacities: PageCounts, device: Device, meter: Meter) -> None:
        """Allocate nothing yet.

        Args:
            stores: Of the tiers whose pages are brought.
            capacities: Pages of each tier.
            device: Where attention is computed.
            meter: Is told of what is moved and held.
        """
        self._stores, self._capacities, self._meter = stores, capacities, meter
        self._device, self._own_memory = device.torch_device, device.own_memory
        self._link = Link(device.torch_device, "cache")
        self._ring = StagingRing(device)
        self._shapes: dict[CacheKey, PageShape] = {}
        self._slots: dict[tuple[int, PageShape], PageTensors] = {}
        self._residency = Residency()
        self._num_slots = 0
        self._last: Transfer | None = None
        self._failure: BaseException | None = None
        self._failure_seen = False

    def reserve(self, slots: int) -> None:
        """Forget what is here, and have at least so many slots.

        Raises:
            OutOfSpace: Or whatever else went wrong beside the computation, if nobody heard of it.
        """
        failure = self._drain()
        if slots > self._num_slots:
            self._num_slots = slots
            self._slots.clear()
        self._residency.reset(self._num_slots)
        if failure is not None:
            raise failure

    def register(self, key: CacheKey, shape: PageShape) -> None:
        """Make room for an attention call where pages rest."""
        self._shapes[key] = shape
        for store in self._stores.values():
            store.register(key, shape)

    def tensors(self, key: CacheKey, shape: PageShape) -> PageTensors:
        """The slots as an attention call sees them."""
        if (key.call, shape) not in self._slots:
            self._slots[key.call, shape] = shape.allocate(self._num_slots, self._device)
            held = sum(tensor.nbytes for pair in self._slots.values() for tensor in pair)
            self._meter.hold("device", "cache slots", held)
        return self._slots[key.call, shape]

    def load(self, j: int, staged: StagedPages) -> Loaded:
        """Start to bring a row's pages of layer j; `wait` before they are used, `release` after."""
        slots, missing = self._residency.load(j, staged)
        batches = list(self._batches(j, missing))
        # Also where nothing is read: what leaves the slots must be gone before the row fills them.
        self._submit(lambda: self._bring(batches, f"load_cache {j}"))
        assert self._last is not None
        return Loaded(torch.tensor(slots, dtype=torch.long, device=self._device), self._last)

    def wait(self, loaded: Loaded) -> None:
        """Let the computation that follows see a row's pages; raises what went wrong on any earlier way."""
        try:
            loaded.arriving.wait()
        except BaseException:
            self._failure_seen = True
            raise

    def release(self, j: int, staged: StagedPages) -> Transfer | None:
        """A row has attended: write back what no other loaded row of layer j needs."""
        leaving = self._residency.release(j, staged)
        if not leaving:
            return None
        batches = list(self._batches(j, leaving))
        self._submit(lambda: self._take_away(batches, f"store_cache {j}"))
        return self._last

    def close(self) -> None:
        """Stop transfers and remove what is on disk."""
        self._link.close()
        for store in self._stores.values():
            store.close()

    def _submit(self, work: Callable[[], None]) -> None:
        self._last = self._link.submit(lambda: self._run(work))

    def _run(self, work: Callable[[], None]) -> None:
        """Do nothing more after a failure: what follows may need what was lost."""
        if self._failure is not None:
            raise self._failure
        try:
            work()
        except BaseException as error:
            self._failure = error
            self._ring.abandon()
            raise

    def _drain(self) -> BaseException | None:
        """Wait for all transfers; returns what went wrong in them, unless somebody heard of it."""
        if self._last is not None:
            with suppress(BaseException):  # it is in _failure
                self._last.wait()
        unheard = None if self._failure_seen else self._failure
        self._failure, self._failure_seen, self._last = None, False, None
        return unheard

    def _batches(self, j: int, places: Mapping[int, int]) -> Iterator[_Batch]:
        """Pages of layer j and their slots, sorted by tier and number: neighbours travel together."""
        by_tier: dict[Tier, list[int]] = {tier: [] for tier in self._stores}
        for page in sorted(places):
            by_tier[self._capacities.tier_of(page)].append(page)
        for key in [key for key in self._shapes if key.layer == j]:
            shape = self._shapes[key]
            self.tensors(key, shape)
            for tier, pages in by_tier.items():
                size = max(1, TRANSFER_BYTES // self._stores[tier].transfer_bytes(shape))
                for part in (pages[i : i + size] for i in range(0, len(pages), size)):
                    indices = [page - self._capacities.first(tier) for page in part]
                    yield _Batch(key, shape, tier, indices, [places[page] for page in part])

    def _bring(self, batches: list[_Batch], name: str) -> None:
        flights: deque[_Flight] = deque()
        for batch in batches:
            if len(flights) == NUM_BUFFERS:
                self._arrive(flights.popleft(), name)
            flight = self._flight(batch)
            store = self._stores[batch.tier]
            flight.buffer.futures += store.read(batch.key, batch.shape, batch.pages, flight.buffer.host)
            flights.append(flight)
        for flight in flights:
            self._arrive(flight, name)

    def _arrive(self, flight: _Flight, name: str) -> None:
        (key, shape, tier, pages, slots), buffer = flight.batch, flight.buffer
        buffer.finish()
        if tier == "disk":
            self._meter.add("disk_read", name, flight.begun, self._meter.now(), flight.num_bytes)
        with self._on_link("host_to_device", flight, name):
            buffer.to_device(flight.num_bytes)
        index = torch.tensor(slots, device=self._device)
        arrived = self._stores[tier].view(shape, buffer.twin, len(pages))
        for target, source in zip(self.tensors(key, shape), arrived, strict=True):
            target.index_copy_(0, index, source)

    def _take_away(self, batches: list[_Batch], name: str) -> None:
        flights: deque[_Flight] = deque()
        for batch in batches:
            if len(flights) == NUM_BUFFERS - 1:
                self._put_down(flights.popleft(), name)
            flight = self._flight(batch)
            index = torch.tensor(batch.slots, device=self._device)
            leaving = self._stores[batch.tier].view(batch.shape, flight.buffer.twin, len(batch.pages))
            for source, target in zip(self.tensors(batch.key, batch.shape), leaving, strict=True):
                target.copy_(source.index_select(0, index))
            with self._on_link("device_to_host", flight, name):
                flight.buffer.to_host(flight.num_bytes)
            flights.append(flight)
        for flight in flights:
            self._put_down(flight, name)
        self._ring.finish()

    def _put_down(self, flight: _Flight, name: str) -> None:
        (key, shape, tier, pages, _), buffer = flight.batch, flight.buffer
        buffer.finish()
        begun = self._meter.now()
        buffer.futures += self._stores[tier].write(key, shape, pages, buffer.host)
        for future in buffer.futures[-1:]:
            future.add_done_callback(lambda _: self._meter.add("disk_write", name, begun, self._meter.now(), flight.num_bytes))

    def _flight(self, batch: _Batch) -> _Flight:
        page_bytes = self._stores[batch.tier].transfer_bytes(batch.shape)
        buffer = self._ring.next(max(TRANSFER_BYTES, page_bytes))
        return _Flight(batch, buffer, page_bytes * len(batch.pages), self._meter.now())

    def _on_link(self, resource: Resource, flight: _Flight, name: str) -> AbstractContextManager[None]:
        """Without a memory of the device's own nothing travels between disk and device but what the disk itself moves."""
        if flight.batch.tier == "disk" and not self._own_memory:
            return nullcontext()
        return self._meter.span(resource, name, flight.num_bytes)

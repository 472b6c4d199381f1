"""Transfers of pages to slots and back, in order, over a store that tells what was asked of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from flexgen_helm.kv_cache import working_set
from flexgen_helm.kv_cache.cargo import Cargo
from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat
from flexgen_helm.kv_cache.page_stores import HostPages
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PageCounts, StagedPages
from flexgen_helm.kv_cache.working_set import Loaded, WorkingSet
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.link import Link
from flexgen_helm.memory.meter import Meter

CPU = torch.device("cpu")
KEY = CacheKey(0, 0)
FORMAT = PageFormat.plain(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3))
NUM_PAGES, NUM_SLOTS, FIRST = 12, 6, 5
"""Pages on the host, slots, and pages on the device, whose numbers come first."""
PAGE_BYTES = 2 * (4 + 3) * PAGE_TOKENS * 4


class ToldPages(HostPages):
    """Host pages that note every transfer, and fail or wait when told to."""

    def __init__(self) -> None:
        super().__init__(NUM_PAGES)
        self.reserve(NUM_PAGES)
        self.moved: list[tuple[str, int, list[int]]] = []
        """Direction, layer, and pages of each transfer."""
        self.failure: OSError | None = None
        """Raised by the next transfers."""
        self.late_failure: OSError | None = None
        """The same, but found where their futures are waited for."""
        self.gate: threading.Event | None = None
        """Writes happen when it opens."""
        self._pool = ThreadPoolExecutor(1)

    def read(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        self._tell("read", cargo.key, pages)
        return super().read(cargo, pages, buffer) + self._late()

    def write(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        self._tell("write", cargo.key, pages)

        def later() -> None:
            assert self.gate is None or self.gate.wait(10)
            super(ToldPages, self).write(cargo, pages, buffer)

        return [self._pool.submit(later), *self._late()]

    def _tell(self, direction: str, key: CacheKey, pages: list[int]) -> None:
        self.moved.append((direction, key.layer, pages))
        if self.failure is not None:
            raise self.failure

    def _late(self) -> list[Future[None]]:
        if self.late_failure is None:
            return []
        future: Future[None] = Future()
        future.set_exception(self.late_failure)
        return [future]

    def close(self) -> None:
        self._pool.shutdown()


class Bench:
    """A working set over such pages, each of which holds its own number."""

    def __init__(self) -> None:
        self.store, self.meter = ToldPages(), Meter(CPU)
        device = Device(CPU, own_memory=True)
        self.link = Link(device.torch_device, "cache")
        self.working = WorkingSet({"host": self.store}, PageCounts(FIRST, NUM_PAGES), device, self.link, self.meter)
        self.working.reserve(NUM_SLOTS)
        for j in range(2):
            self.working.register(CacheKey(j, 0), FORMAT)
            for x in self.store.tensors(CacheKey(j, 0), FORMAT, CPU).tensors:
                x.copy_((torch.arange(NUM_PAGES) + 100 * j).view(-1, 1, 1, 1).expand(x.shape))

    def load(self, *pages: int, j: int = 0, reads: bool = True) -> Loaded:
        """Load a row of pages, numbered from the host's first."""
        return self.working.load(j, staged(*pages, reads=reads))

    def values(self, loaded: Loaded, j: int = 0) -> list[float]:
        """The number that each page of a row holds, in K and in V."""
        self.working.wait(loaded)
        found = []
        for x in self.working.tensors(CacheKey(j, 0), FORMAT).tensors:
            pages = x[loaded.slots].flatten(1)
            assert bool((pages == pages[:, :1]).all())
            found.append(pages[:, 0].tolist())
        assert found[0] == found[1]
        return found[0]

    def fill(self, loaded: Loaded, value: float) -> None:
        """Overwrite a row's pages in their slots."""
        self.working.wait(loaded)
        for x in self.working.tensors(KEY, FORMAT).tensors:
            x[loaded.slots] = value

    def stored(self) -> list[float]:
        return self.store.tensors(KEY, FORMAT, CPU).v[:, 0, 0, 0].tolist()


def staged(*pages: int, reads: bool = True, writes: bool = False) -> StagedPages:
    numbers = [FIRST + page for page in pages]
    return StagedPages(numbers, frozenset(numbers if reads else ()), frozenset(numbers if writes else ()))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.link.close()
    made.working.close()


def test_stores_grow_before_their_pages_travel() -> None:
    """The link's thread reads a store's tensors, which must not be replaced meanwhile."""
    made = Bench()
    made.store.reserve(2 * NUM_PAGES, 2 * NUM_PAGES)
    made.load(0, 1, j=1)
    assert len(made.store._tensors[CacheKey(1, 0), "k", FORMAT.k]) == 2 * NUM_PAGES
    made.link.close()
    made.working.close()


def test_a_page_that_two_rows_touch_is_moved_once_each_way(bench: Bench) -> None:
    first = bench.load(0, 1)
    second = bench.load(1, 2)
    assert bench.values(first) == [0, 1]
    assert bench.values(second) == [1, 2]
    assert first.slots[1] == second.slots[0]
    assert bench.store.moved == [("read", 0, [0, 1]), ("read", 0, [2])]
    transfer = bench.working.release(0, staged(0, 1, writes=True))
    assert transfer is not None
    transfer.wait()
    assert bench.store.moved[2:] == [("write", 0, [0])]  # the second row still needs page 1
    transfer = bench.working.release(0, staged(1, 2))
    assert transfer is not None
    transfer.wait()
    assert bench.store.moved[3:] == [("write", 0, [1])]  # the first row wrote it, nobody wrote page 2


def test_written_pages_go_back_and_others_do_not(bench: Bench) -> None:
    bench.fill(bench.load(3, 7, 4), 50.0)
    assert bench.working.release(0, staged(3, 7, 4, writes=True)) is not None
    bench.fill(bench.load(5), 60.0)
    assert bench.working.release(0, staged(5)) is None
    bench.working.reserve(NUM_SLOTS)  # waits
    assert bench.stored() == [50.0 if page in (3, 7, 4) else page for page in range(NUM_PAGES)]


def test_pages_without_content_are_not_read(bench: Bench) -> None:
    bench.fill(bench.load(2, reads=False), 9.0)
    assert not bench.store.moved
    bench.working.release(0, staged(2, writes=True))
    bench.working.reserve(NUM_SLOTS)
    assert bench.stored()[2] == 9.0


def test_layers_have_pages_of_their_own(bench: Bench) -> None:
    here, there = bench.load(1), bench.load(1, j=1)
    assert (bench.values(here), bench.values(there, 1)) == ([1], [101])
    assert here.slots.tolist() != there.slots.tolist()


def test_a_page_is_stored_before_it_is_loaded_again(bench: Bench) -> None:
    """The write is slow; the load that was asked for behind it finds what was written, in another slot or the same."""
    bench.store.gate = threading.Event()
    bench.fill(bench.load(0, 1), 70.0)
    bench.working.release(0, staged(0, 1, writes=True))
    again = bench.load(1, 2)
    threading.Timer(0.05, bench.store.gate.set).start()
    assert bench.values(again) == [70.0, 2.0]


def test_a_slot_is_emptied_before_it_is_filled_again(bench: Bench) -> None:
    """Rows that use all slots follow each other; what one wrote is stored although the next one has its slots."""
    for begin in (0, NUM_SLOTS):
        row = list(range(begin, begin + NUM_SLOTS))
        loaded = bench.load(*row)
        assert bench.values(loaded) == row
        bench.fill(loaded, 80.0 + begin)
        bench.working.release(0, staged(*row, writes=True))
    bench.working.reserve(NUM_SLOTS)
    assert bench.stored() == [80.0] * NUM_SLOTS + [86.0] * NUM_SLOTS


@pytest.mark.parametrize("late", [False, True])
def test_a_failure_is_told_once_and_later_work_is_not_done(bench: Bench, late: bool) -> None:
    setattr(bench.store, "late_failure" if late else "failure", OSError("torn"))
    first, second = bench.load(0), bench.load(1)
    for loaded in (first, second):
        with pytest.raises(OSError, match="torn"):
            bench.working.wait(loaded)
    bench.working.release(0, staged(0, writes=True))
    bench.store.failure = bench.store.late_failure = None
    bench.working.reserve(NUM_SLOTS)  # it was told
    assert bench.store.moved == [("read", 0, [0])]
    assert bench.values(bench.load(1)) == [1]  # all is well again


def test_a_failure_of_which_nobody_heard_is_told_by_the_next_reserve(bench: Bench) -> None:
    bench.working.wait(bench.load(0))
    bench.store.failure = OSError("full")
    bench.working.release(0, staged(0, writes=True))
    with pytest.raises(OSError, match="full"):
        bench.working.reserve(NUM_SLOTS)
    bench.store.failure = None
    bench.working.reserve(NUM_SLOTS)
    assert bench.values(bench.load(0)) == [0]


def test_pages_travel_together_up_to_a_size_in_order_of_their_numbers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_set, "TRANSFER_BYTES", 2 * PAGE_BYTES + 1)
    loaded = bench.load(9, 0, 4, 1, 3)
    assert bench.values(loaded) == [9, 0, 4, 1, 3]
    assert bench.store.moved == [("read", 0, [0, 1]), ("read", 0, [3, 4]), ("read", 0, [9])]


def test_slots_grow_when_more_are_asked_for(bench: Bench) -> None:
    assert bench.load(0).slots.tolist() == [0]
    bench.working.reserve(NUM_SLOTS + 4)
    loaded = bench.load(*range(NUM_SLOTS + 4))
    assert sorted(loaded.slots.tolist()) == list(range(NUM_SLOTS + 4))
    assert bench.values(loaded) == list(range(NUM_SLOTS + 4))

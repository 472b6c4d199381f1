"""Memory for direct I/O and pinned copies, against what the kernel says of it."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PageCounts, PagePool, PageStorage
from flexgen_helm.memory import buffers
from flexgen_helm.memory.amounts import PAGE, padded
from flexgen_helm.memory.buffers import HUGE_FROM, allocate, lazy_zeros
from tests.memory.alone import alone

SIZE = 64 * 2**20


def resident_bytes() -> int:
    """Bytes of no file: a busy machine takes pages of files from a process, and gives them back."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize(("num_bytes", "expected"), [(0, PAGE), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_memory_is_whole_pages_at_a_page_boundary(num_bytes: int, expected: int) -> None:
    memory = allocate(num_bytes)
    assert (memory.dtype, memory.shape, memory.data_ptr() % PAGE) == (torch.uint8, (expected,), 0)
    assert padded(num_bytes) == (expected if num_bytes else 0)
    memory.fill_(7)


@alone
def test_memory_is_there_before_its_first_use_and_freed_with_its_last_view() -> None:
    gc.collect()
    before = resident_bytes()
    memory = allocate(SIZE)
    assert resident_bytes() - before > 0.9 * SIZE
    view = memory[PAGE : 2 * PAGE].view(torch.bfloat16)
    del memory
    assert resident_bytes() - before > 0.9 * SIZE
    del view
    assert resident_bytes() - before < 0.1 * SIZE


@alone
def test_lazy_zeros_take_memory_where_they_are_used_and_give_it_back() -> None:
    gc.collect()
    before = resident_bytes()
    memory = lazy_zeros(SIZE).view(2, -1)
    assert resident_bytes() - before < 0.1 * SIZE
    memory[1] += 3
    assert 0.4 * SIZE < resident_bytes() - before < 0.6 * SIZE
    assert int(memory[0].max()) == 0
    del memory
    assert resident_bytes() - before < 0.1 * SIZE


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
@pytest.mark.parametrize(("num_bytes", "huge"), [(HUGE_FROM, True), (HUGE_FROM - PAGE, False)])
def test_large_lazy_zeros_come_in_huge_pages(num_bytes: int, huge: bool) -> None:
    memory = lazy_zeros(num_bytes)
    mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    for mapping in filter(None, mappings):
        begin, end = (int(address, 16) for address in mapping.split(" ", 1)[0].split("-"))
        if begin <= memory.data_ptr() < end:
            assert ("hg" in mapping.split("VmFlags:")[1].split()) == huge
            return
    raise AssertionError("the memory is not mapped")


@alone
def test_kept_pages_that_grow_leave_nothing_behind() -> None:
    """The C library keeps tensors up to 32 MiB that are freed: caches that grew layer by layer took twice their size."""
    capacity, num_layers = 512, 20
    cache = PagedCache({"exact": PagePool(capacity)})
    k = torch.zeros(1, 8, 64)
    page_bytes = 2 * k.nbytes * PAGE_TOKENS
    torch.ones(31 * 2**20, dtype=torch.uint8)  # freed: from now on such sizes come from the heap
    gc.collect()
    before, peak = resident_bytes(), 0
    for pages in range(0, capacity + 1, 64):
        cache.reserve({"exact": PageStorage(PageCounts(pages))})
        for j in range(num_layers):
            for x in cache.tensors(CacheKey(j, 0), k, k, {"exact": {"device"}})["exact"]["device"].tensors:
                x[max(0, pages - 64) : pages] = 1.0
        peak = max(peak, resident_bytes() - before)
    assert peak == pytest.approx(capacity * num_layers * page_bytes, rel=0.05)


@pytest.mark.parametrize("num_bytes", [2**50, 2**63])
def test_more_memory_than_there_is(num_bytes: int) -> None:
    with pytest.raises(OutOfSpace, match=f"{num_bytes / 2**30:.2f} GiB of memory could not be taken"):
        allocate(num_bytes)


@pytest.mark.gpu
def test_pinned_memory_copies_beside_the_host_and_is_unpinned_when_it_is_freed() -> None:
    for _ in range(3):  # an address that comes again can be pinned again
        memory = allocate(SIZE + 1, pin=True)
        assert memory.is_pinned()
        assert len(memory) == SIZE + PAGE
        memory.random_(0, 256)
        assert torch.equal(memory.to("cuda", non_blocking=True).cpu(), memory)
        del memory


@pytest.mark.parametrize("status", [1, 2])
def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    refused: list[int] = []

    def refuse(address: int, num_bytes: int, flags: int) -> int:
        refused.append(address)
        return status

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=refuse))
    cleared: list[bool] = []
    monkeypatch.setattr(buffers, "_forget_last_error", lambda: cleared.append(True))
    buffers._log_refused_pin.cache_clear()
    found = [allocate(PAGE, pin=True) for _ in range(3)]
    assert refused == [memory.data_ptr() for memory in found]
    assert len(cleared) == 3
    assert [memory.fill_(7).sum() for memory in found] == [7 * PAGE] * 3
    assert [message.partition(",")[0] for message in caplog.messages] == [
        f"host memory could not be pinned (CUDA status {status})"
    ]


@pytest.mark.gpu
def test_a_refused_pin_leaves_no_error_for_the_next_kernel() -> None:
    memory = allocate(PAGE, pin=True)
    buffers._pin(memory, (ctypes.c_ubyte * 1)())  # CUDA refuses what is pinned already
    assert int(torch.ones(3, device="cuda").sum()) == 3

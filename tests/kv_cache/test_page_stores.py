"""Tensors of pages: small ones that grow on a CPU, whole ones on a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from flexgen_helm.kv_cache.cargo import Cargo
from flexgen_helm.kv_cache.form_pages import FormPages
from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat
from flexgen_helm.kv_cache.page_stores import GrowingPages, HostPages
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PageCounts, PagePool, PageStorage, StagedPages
from flexgen_helm.kv_cache.sealed_format import sealed_format
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.link import Link
from flexgen_helm.memory.meter import Meter

CAPACITY = 40
GPU = Device(torch.device("cuda"))


@pytest.mark.parametrize(("device", "sizes"), [(CPU, [3, 4, 40]), (GPU, [40, 40, 40])])
def test_a_gpus_pages_are_made_at_their_capacity(device: Device, sizes: list[int]) -> None:
    """K and V decide where pages are made, and are on the CPU in this test."""
    cache, k = PagedCache({"exact": PagePool(CAPACITY)}, device=device), torch.zeros(1, 2, 4)
    found = []
    for pages in (3, 4, CAPACITY):
        cache.reserve({"exact": PageStorage(PageCounts(pages))})
        found.append(len(cache.tensors(CacheKey(0, 0), k, k, {"exact": {"device"}})["exact"]["device"].k))
    assert found == sizes


def test_pages_made_larger_take_over_the_old_ones_and_are_zeros_behind() -> None:
    page_format, pages = PageFormat.plain(torch.zeros(1, 2, 8), torch.zeros(1, 2, 16)), GrowingPages(None)
    pages.reserve(2)
    old = pages.tensors(CacheKey(0, 0), page_format, CPU.torch_device)
    for x in old.tensors:
        x.normal_()
    pages.reserve(5)
    larger = pages.tensors(CacheKey(0, 0), page_format, CPU.torch_device)
    assert pages.num_bytes == larger.num_bytes == 5 * page_format.num_bytes
    for x, before in zip(larger.tensors, old.tensors, strict=True):
        assert torch.equal(x[:2], before)
        assert not x[2:].any()


def test_stores_are_emptied_when_their_transfers_have_ended() -> None:
    """A lower limit drops the host's pages, to which the last sweep may still be writing."""
    device = Device(torch.device("cpu"), own_memory=True)
    pool, link, key = PagePool(2, host=8, shares=(0, 1, 0)), Link(device.torch_device, "cache"), CacheKey(0, 0)
    pages = FormPages("exact", pool, device=device, offload_folder=None, link=link, meter=Meter(device.torch_device))
    pages.reserve(PageStorage(PageCounts(0, 8)), 2)
    page_format = PageFormat.plain(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    pages.tensors(key, page_format, {"staged"}, device.torch_device)
    row = StagedPages([2, 3], frozenset(), frozenset([2, 3]))
    pages.working.wait(pages.working.load(0, row))
    link.submit(lambda: time.sleep(0.1))
    pages.working.release(0, row)
    pool.resize(0.5)
    pages.reserve(PageStorage(PageCounts(0, 4)), 2)
    link.close()
    pages.close()


SHAPES = [(8, 64, 16, 16), (2, 64, 4, 2), (3, 10, 2, 16), (1, 7, 2, 8)]
"""Heads, their size, and bits of K and V."""


@pytest.mark.parametrize(("num_heads", "dim", "k_bits", "v_bits"), SHAPES)
def test_host_pages_travel_bit_by_bit(num_heads: int, dim: int, k_bits: int, v_bits: int) -> None:
    """Whatever the numbers are as which they are moved: any bytes, NaN among them, in pages of any size."""
    x, chance = torch.zeros(1, num_heads, dim, dtype=torch.bfloat16), torch.Generator().manual_seed(0)
    page_format, key, count, pages = PageFormat.plain(x, x), CacheKey(0, 0), 9, [7, 2, 5]
    page_format = sealed_format(page_format, k_bits=k_bits, v_bits=v_bits)
    store, cargo = HostPages(count), Cargo(key, page_format)
    store.reserve(count)
    store.register(key, page_format)
    sent, found = (torch.randint(0, 256, (len(pages) * cargo.num_bytes,), generator=chance).byte() for _ in range(2))
    store.write(cargo, pages, sent)
    store.read(cargo, pages, found)
    assert torch.equal(found, sent)
    for stored, part in zip(store.tensors(key, page_format, CPU.torch_device).tensors, cargo.stretches(sent, 3), strict=True):
        raw = stored.view(torch.uint8)
        assert torch.equal(raw[pages], part.view(torch.uint8))
        assert not raw[[i for i in range(count) if i not in pages]].any()

"""Tensors of pages: small ones that grow on a CPU, whole ones on a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from flexgen_helm.kv_cache.form_pages import FormPages
from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PageCounts, PagePool, PageStorage, StagedPages
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

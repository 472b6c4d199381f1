"""Tensors of pages: small ones that grow on a CPU, whole ones on a GPU."""

from __future__ import annotations

import pytest
import torch

from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PageCounts, PagePool, PageStorage
from flexgen_helm.memory.device import CPU, Device

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

"""The plain form of pages against indexing by hand."""

from __future__ import annotations

import pytest
import torch

from flexgen_helm.kv_cache.cargo import Cargo
from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat
from flexgen_helm.kv_cache.pages import PAGE_TOKENS

CPU = torch.device("cpu")
NUM_PAGES, NUM_HEADS, K_DIM, V_DIM = 5, 3, 8, 6


def random_tokens(count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, NUM_HEADS, dim).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_written_are_read_and_gathered_k_and_v_apart(dtype: torch.dtype) -> None:
    new = random_tokens(40, K_DIM, dtype), random_tokens(40, V_DIM, dtype)
    page_format = PageFormat.plain(*new)
    stored = page_format.allocate(NUM_PAGES, CPU)
    where = torch.randperm(NUM_PAGES * PAGE_TOKENS)[:40]
    pages, tokens = where // PAGE_TOKENS, where % PAGE_TOKENS
    for (part, tensor), x in zip(stored.writable_parts, new, strict=True):
        expected = torch.zeros(NUM_PAGES, PAGE_TOKENS, NUM_HEADS, part.dim, dtype=dtype)
        for page, token, vector in zip(pages, tokens, x, strict=True):
            expected[page, token] = vector
        part.write(tensor, pages, tokens, x)
        assert torch.equal(part.read(tensor, pages, tokens), x)
        rows = torch.tensor([4 * NUM_HEADS + 2, 0, 1 * NUM_HEADS + 1])
        chosen = [expected[page, :, head].flatten() for page, head in ((4, 2), (0, 0), (1, 1))]
        assert torch.equal(part.gather(tensor, rows), torch.stack(chosen))
        out = torch.empty(3, PAGE_TOKENS * part.dim, dtype=dtype)
        assert part.gather(tensor, rows, out) is out
        assert torch.equal(out, torch.stack(chosen))


def test_bytes_are_those_of_the_tensors() -> None:
    page_format = PageFormat.plain(torch.zeros(1, NUM_HEADS, K_DIM), torch.zeros(1, NUM_HEADS, V_DIM))
    stored = page_format.allocate(NUM_PAGES, CPU)
    assert stored.num_bytes == NUM_PAGES * page_format.num_bytes == sum(x.nbytes for x in stored.tensors)
    assert [part.num_bytes for part in page_format.parts] == [x[0].nbytes for x in stored.tensors]
    assert page_format.num_bytes_per_token == NUM_HEADS * (K_DIM + V_DIM) * 4


def test_bytes_of_a_transfer_are_pages() -> None:
    page_format = PageFormat.plain(torch.zeros(1, NUM_HEADS, K_DIM), torch.zeros(1, NUM_HEADS, V_DIM))
    stored = page_format.allocate(NUM_PAGES, CPU)
    for x in stored.tensors:
        x.normal_()
    # One record a page, K before V, and something behind it: rows that are not contiguous.
    k, v = (x.flatten(1).view(torch.uint8) for x in stored.tensors)
    records = torch.cat([k, v, torch.zeros(NUM_PAGES, 64, dtype=torch.uint8)], 1)
    cargo = Cargo(CacheKey(0, 0), page_format)
    found = cargo.records(records[:, : page_format.num_bytes])
    assert all(torch.equal(a, b) for a, b in zip(found, stored.tensors, strict=True))
    (values,) = cargo._replace(names=("v",)).records(v)
    assert torch.equal(values, stored.v)

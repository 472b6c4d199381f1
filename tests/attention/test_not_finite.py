"""K and V that are not finite: they reach no other sequence, and nothing of them stays in pages, wherever those rest."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_helm.attention.row import RowAttention
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PageCounts, PagePool, PageStorage, num_pages
from flexgen_helm.memory.device import Device
from flexgen_helm.schedule.rows import Row, Segment
from flexgen_helm.schedule.tree import Node
from tests.attention.test_row import RULES, Heads, Machine, Options, random_rows
from tests.attention.test_tiers import NUM_LAYERS, SHARES, TieredMachine

DIRTY, REUSED = [200, 170, 100], [90, 33, 60]
"""Lengths of sequences, and of those that get their pages."""
BAD = [math.nan, math.inf, -math.inf, 3e38]
"""The last is finite, but its product with a query is not."""


def sweeps(machine: TieredMachine, lengths: list[int], seed: int) -> None:
    rows = random_rows(lengths, 0, seed)
    for begin in range(0, len(rows), 3):
        machine.sweep(rows[begin : begin + 3])


def copied(machine: TieredMachine) -> list[list[torch.Tensor]]:
    return [[output.clone() for output in layer] for layer in machine.layers]


@settings(derandomize=True, max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([Heads(4, 2, 16, 16), Heads(2, 2, 16, 24)]),
    st.builds(Options, st.sampled_from(sorted(RULES)), st.sampled_from([None, 20.0]), st.booleans()),
    st.lists(st.integers(0, DIRTY[0] - 1), min_size=1, max_size=4),
    st.sampled_from([1, 2]),
    st.sampled_from(BAD),
    SHARES,
    st.booleans(),
    st.integers(0, 9),
)
def test_neighbours_and_later_owners_of_pages_keep_their_bits(
    tmp_path: Path,
    heads: Heads,
    options: Options,
    tokens: list[int],
    which: int,
    bad: float,
    shares: tuple[float, float, float],
    own_memory: bool,
    seed: int,
) -> None:
    """The first of three sequences has tokens with bad K or V; then others have the pages of all three."""
    count = sum(num_pages(0, n) for n in DIRTY)
    answers = []
    for dirty in (True, False):
        pool = PagePool(count, host=count, disk=count, shares=shares)
        machine = TieredMachine(
            heads, options, DIRTY, 0, pool, device=Device(torch.device("cpu"), own_memory), offload_folder=tmp_path
        )
        try:
            if dirty:
                machine.inputs[0][which][tokens, 0, 3] = bad
                machine.inputs[0][0][tokens] = bad
            sweeps(machine, DIRTY, seed)
            first = copied(machine)
            machine.inputs = Machine(heads, options, REUSED, 0).inputs
            sweeps(machine, REUSED, seed)
            second = [[output[:n] for output, n in zip(layer, REUSED, strict=True)] for layer in copied(machine)]
        finally:
            machine.cache.close()
        answers.append((first, second))
    (first, second), (clean_first, clean_second) = answers
    for j in range(NUM_LAYERS):
        assert all(torch.equal(a, b) for a, b in zip(first[j][1:], clean_first[j][1:], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(second[j], clean_second[j], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_whose_tokens_were_bad_is_noted_and_pages_stay_finite(dtype: torch.dtype, which: str, bad: float) -> None:
    cache = PagedCache()
    cache.reserve({"exact": PageStorage(PageCounts(2))})
    owners = [Node(None, 0, (0,) * 5), Node(None, 0, (0,) * 6)]
    row = Row("prefill", 16, [Segment(owner.tokens, 0, [i], owner=owner) for i, owner in enumerate(owners)])
    attention = RowAttention(RowPages(row, cache.page_maps), cache, torch.device("cpu"))
    q, k, v = (torch.randn(16, 2, 16).to(dtype) for _ in range(3))
    (k if which == "k" else v)[[7, 12], 1, 3] = bad  # of the second sequence, and of the padding
    attention.attend(CacheKey(0, 0), (q, k, v), RULES["causal"], scale=0.25, softcap=None, sinks=None)
    row.mark(attention.bad.nonzero()[:, 0].tolist())
    assert [owner.finite for owner in owners] == [True, False]
    stored = cache.tensors(CacheKey(0, 0), k, v, {"exact": {"device"}})["exact"]["device"]
    assert all(bool(x.isfinite().all()) for x in stored.tensors)


def test_the_largest_numbers_are_no_error() -> None:
    cache = PagedCache()
    cache.reserve({"exact": PageStorage(PageCounts(1))})
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        pages = RowPages(Row("prefill", 16, [Segment((0,) * 16, 0, [0])]), cache.page_maps)
        attention = RowAttention(pages, cache, torch.device("cpu"))
        k = torch.full((16, 1, 16), min(2.0**58, torch.finfo(dtype).max), dtype=dtype)
        v = torch.full((16, 1, 16), torch.finfo(dtype).max, dtype=dtype)
        attention.attend(CacheKey(0, 0), (k, k, v), RULES["causal"], scale=0.25, softcap=None, sinks=None)
        assert not bool(attention.bad.any())

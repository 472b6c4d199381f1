"""The kernel for GPUs, run by Triton's interpreter: equal to dense attention, and alone as beside others by a bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.attention.paged.attention import attend_row
from flexgen_helm.attention.paged.plan import TilePlan, tile_queries
from flexgen_helm.attention.paged.trial import HeadShape, paged_kernel, require_equal
from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from tests.attention.test_row import OPTIONS, Heads, Machine, Options, random_rows

CPU = torch.device("cpu")
FEW_HEADS = st.sampled_from([Heads(2, 2, 16, 16), Heads(6, 2, 24, 16), Heads(3, 1, 32, 80)])
FORMATS = {
    "plain": PLAIN_CACHE,
    "kv4": CacheFormat(4, 4),
    "k8v2": CacheFormat(8, 2),
    "k16v4": CacheFormat(16, 4),
}


def machine(heads: Heads, options: Options, lengths: list[int], prefix: int, cache_format: CacheFormat) -> Machine:
    made = Machine(heads, options, lengths, prefix, cache_format)
    made.decode, made.attend_tiles = None, attend_row
    return made


@settings(derandomize=True, max_examples=5, deadline=None)
@given(FEW_HEADS, OPTIONS, st.lists(st.integers(1, 200), min_size=1, max_size=3), st.sampled_from([0, 40]), st.integers(0, 9))
def test_rows_equal_dense_attention(heads: Heads, options: Options, lengths: list[int], prefix: int, seed: int) -> None:
    paged = machine(heads, options, lengths, prefix, PLAIN_CACHE)
    for row in random_rows(lengths, prefix, seed):
        paged.run(*row)
    assert paged.worst() < 1e-6


def cases(fast: set[tuple[str, int]], options: list[Options]) -> list[object]:
    return [
        pytest.param(name, each, marks=() if (name, i) in fast else pytest.mark.slow, id=f"{name}-{i}")
        for name in FORMATS
        for i, each in enumerate(options)
    ]


BY_HAND = [Options(), Options("sliding", sinks=True), Options("chunked", softcap=20.0)]
TOGETHER = [Options(), Options("sliding"), Options(softcap=20.0), Options(sinks=True)]


@pytest.mark.parametrize(("name", "options"), cases({("plain", 1), ("kv4", 0), ("k8v2", 2)}, BY_HAND))
def test_the_kernel_equals_attention_by_hand(name: str, options: Options) -> None:
    heads, lengths = Heads(6, 2, 32, 80), [200, 140]
    paged, by_hand = (machine(heads, options, lengths, 40, FORMATS[name]) for _ in range(2))
    by_hand.attend_tiles = None
    for row in random_rows(lengths, 40, 1):
        paged.run(*row)
        by_hand.run(*row)
    for mine, other in zip(paged.outputs, by_hand.outputs, strict=True):
        assert ((mine - other).abs() <= 1e-6 * other.abs().clamp(min=1)).all()


@pytest.mark.parametrize(("name", "options"), cases({("plain", 1), ("kv4", 0)}, TOGETHER))
def test_alone_is_together(name: str, options: Options) -> None:
    heads, lengths = Heads(3, 1, 32, 32), [170, 150]
    alone, together = (machine(heads, options, lengths, 0, FORMATS[name]) for _ in range(2))
    for i, n in enumerate(lengths):
        for a in range(0, n - 1, 64):
            alone.run("prefill", 64, [(i, a, min(n - 1, a + 64))])
        alone.run("decode", 16, [(i, n - 1, n)])
    for _, size, pieces in random_rows([n - 1 for n in lengths], 0, 3):
        together.run("prefill", 64 if size < 64 else size, pieces)
    together.run("decode", 16, [(i, n - 1, n) for i, n in enumerate(lengths)])
    for mine, other in zip(alone.outputs, together.outputs, strict=True):
        assert torch.equal(mine, other)


def test_the_trial_passes_and_a_wrong_kernel_is_refused() -> None:
    shape = HeadShape(4, 2, 16)
    require_equal(attend_row, CPU, shape, CacheFormat(4, 4), torch.float32)

    def without_the_last_visit(plan: TilePlan, *arguments: Any, **options: Any) -> Tensor:
        tiles = plan.tiles.clone()
        tiles[-1, -1] -= 1
        return attend_row(replace(plan, tiles=tiles), *arguments, **options)

    with pytest.raises(RuntimeError, match="differs from attention by hand"):
        require_equal(without_the_last_visit, CPU, shape, PLAIN_CACHE, torch.float32)


def test_no_kernel_where_no_gpu_is() -> None:
    assert paged_kernel(CPU, HeadShape(4, 2, 16), PLAIN_CACHE, torch.float32) is None


@pytest.mark.parametrize(
    ("kind", "sharing", "expected"),
    [("decode", 8, 1), ("prefill", 1, 64), ("prefill", 3, 32), ("prefill", 8, 16), ("prefill", 200, 1)],
)
def test_tiles_have_at_most_128_rows(kind: str, sharing: int, expected: int) -> None:
    assert tile_queries(kind, sharing) == expected

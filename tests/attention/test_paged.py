"""The kernel for GPUs, run by Triton's interpreter: equal to dense attention, and alone as beside others by a bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
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
from tests.gpu_code import assert_it_compiles

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


@pytest.mark.parametrize(("name", "options"), cases({("plain", 1), ("kv4", 0)}, BY_HAND))
def test_the_kernel_equals_attention_by_hand(name: str, options: Options) -> None:
    heads, lengths = Heads(6, 2, 32, 80), [200, 140]
    paged, by_hand = (machine(heads, options, lengths, 40, FORMATS[name]) for _ in range(2))
    by_hand.attend_tiles = None
    for row in random_rows(lengths, 40, 1):
        paged.run(*row)
        by_hand.run(*row)
    for mine, other in zip(paged.outputs, by_hand.outputs, strict=True):
        assert ((mine - other).abs() <= 1e-6 * other.abs().clamp(min=1)).all()


@pytest.mark.parametrize(("name", "options"), cases({("kv4", 0)}, TOGETHER))
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


@pytest.mark.slow
def test_the_trial_passes_and_a_wrong_kernel_is_refused() -> None:
    shape = HeadShape(4, 2, 16, 24)
    require_equal(attend_row, CPU, shape, CacheFormat(4, 4), torch.float16)  # the interpreter does not compute in bfloat16

    def without_the_last_visit(plan: TilePlan, *arguments: Any, **options: Any) -> Tensor:
        tiles = plan.tiles.clone()
        tiles[-1, -1] -= 1
        return attend_row(replace(plan, tiles=tiles), *arguments, **options)

    with pytest.raises(RuntimeError, match="differs from attention by hand"):
        require_equal(without_the_last_visit, CPU, shape, PLAIN_CACHE, torch.float32)

    def moved_by_neighbours(plan: TilePlan, q: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return attend_row(plan, q, *arguments, **options) * (1 + 1e-6 * len(q) / 100)

    with pytest.raises(RuntimeError, match="alone has other bits"):
        require_equal(moved_by_neighbours, CPU, shape, PLAIN_CACHE, torch.float32)


def test_no_kernel_where_no_gpu_is() -> None:
    assert paged_kernel(CPU, HeadShape(4, 2, 16, 16), PLAIN_CACHE, torch.float32) is None


@pytest.mark.parametrize(
    ("kind", "sharing", "itemsize", "expected"),
    [
        ("decode", 8, 2, 1),
        ("prefill", 1, 2, 64),
        ("prefill", 3, 2, 16),
        ("prefill", 8, 2, 8),
        ("prefill", 1, 4, 32),
        ("prefill", 200, 2, 1),
    ],
)
def test_queries_of_a_tile(kind: str, sharing: int, itemsize: int, expected: int) -> None:
    assert tile_queries(kind, sharing, itemsize) == expected


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flexgen_helm.attention.paged.attention import constants, num_warps
from flexgen_helm.attention.paged.kernel import attend_tiles
from flexgen_helm.attention.paged.plan import tile_queries
from flexgen_helm.kv_cache.page_format import PageFormat
from flexgen_helm.kv_cache.sealed_format import sealed_format

heads, kv, dim, kind, name, bits = (int(x) if x.isdigit() else x for x in sys.argv[1:])
dtype = getattr(torch, name)
exact = PageFormat.plain(*(torch.empty(0, kv, dim, dtype=dtype),) * 2)
sealed = exact if bits == 16 else sealed_format(exact, k_bits=bits, v_bits=bits)
size = tile_queries(kind, heads // kv, dtype.itemsize)
options = {"HAS_SEALED": bits != 16, "HAS_SOFTCAP": True, "HAS_SINKS": True}
fixed = {**constants(size, heads, exact, sealed), **options}
float_type = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
pointers = {"queries": float_type, "outputs": float_type, "sinks": float_type, "tiles": "i32", "visits": "i32", "masks": "u8"}
pointers |= {"exact_slots": "i64", "sealed_slots": "i64"}
signature = {}
for argument in attend_tiles.arg_names:
    plain = "fp32" if argument in ("scale", "softcap") else "i32" if argument.endswith("bytes") else "i64"
    signature[argument] = f"*{pointers[argument]}" if argument in pointers else "constexpr" if argument in fixed else plain
source = ASTSource(fn=attend_tiles, signature=signature, constexprs=fixed)
options = {"num_warps": num_warps(size, dtype), "enable_fp_fusion": True}
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
assert made.asm["cubin"] and made.metadata.shared <= 227 * 1024, made.metadata.shared
"""
GPU_CODE = [("56", "56", "128"), ("32", "8", "128"), ("16", "8", "256"), ("9", "3", "64"), ("32", "32", "80")]


FORMS = [("bfloat16", "16"), ("bfloat16", "4"), ("float32", "16")]
FAST = ("32", "8", "128", "decode", "bfloat16", "4")
COMPILED = [(*heads, kind, *form) for heads in GPU_CODE for kind in ("decode", "prefill") for form in FORMS]


@pytest.mark.parametrize(
    "arguments", [pytest.param(each, marks=() if each == FAST else pytest.mark.slow) for each in COMPILED], ids=" ".join
)
def test_the_kernel_compiles_for_an_h100(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Without a GPU: by Triton's own compiler and assembler, in a process without the interpreter."""
    assert_it_compiles(COMPILE, arguments, tmp_path)

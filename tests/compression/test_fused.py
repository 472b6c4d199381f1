"""Kernels that unpack weights, run by Triton's interpreter, against torch's operators; and whether they compile for a GPU.

The interpreter does not round to bfloat16 as a GPU does. `flexgen_helm.compression.fused.unpack.serves` tries that at load.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.compression import columns, minmax
from flexgen_helm.compression.fused import unpack
from flexgen_helm.compression.minmax import MinMax
from tests.gpu_code import assert_it_compiles

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU of this machine")
DTYPES = [torch.float32, torch.float16]
SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 140))
few = settings(derandomize=True, max_examples=25, deadline=None)


def target_of(shape: tuple[int, int], dtype: torch.dtype, gap: int) -> torch.Tensor:
    """Rows that are no neighbours, as in a matrix that is part of a larger tensor."""
    return torch.full((shape[0], shape[1] + gap), 7.0, dtype=dtype)[:, : shape[1]]


@few
@given(SHAPES, st.sampled_from([(2, 3, 4, 6), (3, 4, 5, 8), (4, 5, 6, 8), (8,)]), st.sampled_from(DTYPES), st.integers(0, 3))
def test_columns_of_several_widths(shape: tuple[int, int], ladder: tuple[int, ...], dtype: torch.dtype, gap: int) -> None:
    chance = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    weight = torch.randn(shape, generator=chance) * torch.rand(shape[1], generator=chance)
    widths = torch.tensor(ladder, dtype=torch.uint8)[torch.randint(len(ladder), (shape[1],), generator=chance)]
    stored = columns.quantize(weight, widths, ladder).to(torch.device("cpu"))
    target = target_of(shape, dtype, gap)
    unpack.unpack_columns(stored, target)
    assert torch.equal(target, columns.dequantize(stored).to(dtype))
    if gap:
        assert (target.as_strided((shape[0], gap), (target.stride(0), 1), shape[1]) == 7).all()


@few
@given(SHAPES, st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 40, 64]), st.sampled_from(DTYPES))
def test_groups_with_a_range(shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype) -> None:
    stored = MinMax(bits, group).quantize(torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] + bits)))
    target = target_of(shape, dtype, 1)
    unpack.unpack_minmax(stored, target)
    assert torch.equal(target, minmax.dequantize(stored).to(dtype))


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack.require_equal(torch.device("cpu"), torch.float32)
    own = unpack.unpack_minmax
    monkeypatch.setattr(unpack, "unpack_minmax", lambda stored, target: (own(stored, target), target[-1].add_(1e-6)))
    with pytest.raises(RuntimeError, match="differ"):
        unpack.require_equal(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("broken", [False, True])
def test_where_it_does_not_serve_the_log_says_why(
    broken: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tried(device: torch.device, dtype: torch.dtype) -> None:
        if broken:
            raise ValueError("no compiler")

    monkeypatch.setattr(unpack, "require_equal", tried)
    assert unpack.serves.__wrapped__(torch.device("cuda"), torch.float32) is not broken
    assert ("does not serve here: no compiler" in caplog.text) is broken


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flexgen_helm.compression.fused import kernel
from flexgen_helm.compression.fused.unpack import OPTIONS

name, bits, number = sys.argv[1], int(sys.argv[2]), sys.argv[3]
made = getattr(kernel, name)
pointers = {"codes": "u8", "order": "i64", "super_scales": "fp16", "unit": "fp32", "target": number}
pointers |= {"scales": "u8"} if name == "unpack_columns" else {"scales": "fp16", "minima": "fp16"}
fixed = {"BITS": bits} | ({} if name == "unpack_columns" else {"GROUP": 64})
signature = {x: f"*{pointers[x]}" if x in pointers else "constexpr" if x in fixed else "i32" for x in made.arg_names}
source = ASTSource(fn=made, signature=signature, constexprs=fixed)
binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
assert binary.asm["cubin"] and "fma.rn.f32" not in binary.asm["ptx"]
"""
FAST = ("unpack_columns", "4", "bf16")
COMPILED = [("unpack_columns", bits, number) for bits in "34568" for number in ("bf16", "fp32")]
COMPILED += [("unpack_minmax", bits, "bf16") for bits in "2348"]


@pytest.mark.parametrize(
    "arguments", [pytest.param(each, marks=() if each == FAST else pytest.mark.slow) for each in COMPILED], ids=" ".join
)
def test_the_kernels_compile_for_an_h100(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Without a GPU, in a process without the interpreter; no product is fused with a sum."""
    assert_it_compiles(COMPILE, arguments, tmp_path)

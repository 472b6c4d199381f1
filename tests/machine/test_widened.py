"""Products of 16-bit matrices in float32, against float64 and against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from flexgen_helm.machine import matmul, widened
from flexgen_helm.machine.matmul import WIDENED, Matmul, product_by
from flexgen_helm.machine.slices import SCRATCH_BYTES, slice_features
from flexgen_helm.machine.widened import WIDENED_DTYPES, WidenedProduct

LIBRARIES = [name for name in WIDENED if name in matmul.serving(torch.bfloat16)]
SMALLEST = 2.0**-24
"""Spacing of the smallest numbers of float16; those of bfloat16 are smaller."""


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.sampled_from(LIBRARIES),
    st.sampled_from(WIDENED_DTYPES),
    st.integers(1, 200),
    st.integers(1, 200),
    st.sampled_from([(16,), (3, 16), (1, 64), (1,), (1, 1), (2,), (13,)]),
    st.booleans(),
    st.sampled_from([16, 48, 10**6]),
)
def test_outputs_are_those_of_float64_rounded_once(
    library: Matmul, dtype: torch.dtype, outputs: int, inputs: int, tokens: tuple[int, ...], biased: bool, size: int
) -> None:
    x, weight = drawn(1, (*tokens, inputs), dtype), drawn(2, (outputs, inputs), dtype)
    bias = drawn(3, (outputs,), dtype) if biased else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "slice_features", lambda num_inputs: size)
        found = product_by(library)(x, weight, bias)
    assert (found.dtype, found.shape) == (dtype, (*tokens, outputs))
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Sums in float32 are off by a share of the magnitudes that they add; then an output is rounded to the nearest number.
    added = linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    added *= torch.finfo(torch.float32).eps * (inputs + 1)
    error = (found.double() - exact).abs()
    assert bool((error <= added + (exact.abs() + added) * torch.finfo(dtype).eps / 2 + SMALLEST / 2).all())
    # Nothing in 16 bits is closer than the nearest number, torch's own products included.
    assert bool((error <= (linear(x, weight, bias).double() - exact).abs() + 2 * added).all())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", WIDENED_DTYPES)
def test_weights_whose_columns_lie_side_by_side(library: Matmul, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "slice_features", lambda num_inputs: 32)
    library = matmul.for_transposed(library)
    x, weight = drawn(4, (16, 50), dtype), drawn(5, (50, 90), dtype)
    found = product_by(library)(x, weight.T.T.T, None)
    expected = x.double() @ weight.double()
    assert (found.double() - expected).abs().max() <= expected.abs().max() * torch.finfo(dtype).eps


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.sampled_from(LIBRARIES), st.integers(1, 200), st.integers(1, 600), st.integers(1, 160), st.integers(0, 3))
def test_no_bit_of_a_token_depends_on_the_number_of_tokens(
    library: Matmul, outputs: int, inputs: int, count: int, first: int
) -> None:
    x, weight = drawn(11, (256, inputs), torch.bfloat16), drawn(12, (outputs, inputs), torch.bfloat16)
    product = product_by(library)
    rows = slice(16 * first, 16 * first + count)
    assert torch.equal(product(x[rows], weight, None), product(x, weight, None)[rows])


@pytest.mark.parametrize("library", LIBRARIES)
def test_matrices_of_other_dtypes_are_multiplied_as_they_are(library: Matmul) -> None:
    """A model in 16 bits may have layers in float32, such as routers."""
    x, weight = drawn(6, (16, 40), torch.float32), drawn(7, (24, 40), torch.float32)
    assert torch.equal(product_by(library)(x, weight, None), matmul.PRODUCTS[WIDENED[library]](x, weight, None))


@pytest.mark.parametrize("num_inputs", [1, 576, 4096, 53_248, 65_536])
def test_a_slice_has_no_more_bytes_than_are_planned(num_inputs: int) -> None:
    assert slice_features(num_inputs) % 16 == 0
    assert 0.8 * SCRATCH_BYTES <= 4 * num_inputs * slice_features(num_inputs) <= SCRATCH_BYTES


def test_the_buffer_of_a_large_head_is_small_and_no_part_of_a_copy() -> None:
    product = WidenedProduct(linear)
    weight = drawn(8, (8192, 512), torch.bfloat16)
    found = product(torch.eye(512, dtype=torch.bfloat16)[:16], weight, None)
    assert torch.equal(found, weight.T[:16])  # all slices are in their places
    assert product._scratch is not None
    assert product._scratch.nbytes <= SCRATCH_BYTES < 4 * weight.numel()
    assert copy.deepcopy(product)._scratch is None


def test_one_product_serves_inside_and_outside_of_inference_mode() -> None:
    product, x, weight = WidenedProduct(linear), drawn(9, (16, 32), torch.bfloat16), drawn(10, (48, 32), torch.bfloat16)
    with torch.inference_mode():
        inside = product(x, weight, None)
    assert torch.equal(product(x, torch.nn.Parameter(weight), None), inside)

"""FlexGen's format against FlexGen's formula in NumPy, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression.minmax import MinMax, dequantize
from flexgen_helm.compression.packing import unpack
from flexgen_helm.errors import PolicyError, UnsupportedModel


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@given(st.integers(1, 150), st.integers(1, 9), st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 32, 64, 100]))
def test_numbers_are_those_of_flexgens_formula(num_rows: int, num_columns: int, bits: int, group: int) -> None:
    weight = gaussian(num_rows, num_columns)
    stored = MinMax(bits, group).quantize(weight)
    codes, found = unpack(stored.codes, bits, num_rows).numpy(), dequantize(stored).numpy()
    for g, first in enumerate(range(0, num_rows, group)):
        x = weight[first : first + group].numpy()
        low, high = x.min(0), x.max(0)
        with np.errstate(divide="ignore", invalid="ignore"):
            # FlexGen divides in torch, which multiplies by the rounded reciprocal.
            scale = (np.float32(1) / (high - low)) * np.float32(2**bits - 1)
            expected = np.where(high > low, np.clip(np.round((x - low) * scale), 0, 2**bits - 1), 0)
        np.testing.assert_array_equal(codes[first : first + group], expected)
        scale = np.where(np.isinf(scale), np.float32(65504), scale).astype(np.float16)
        np.testing.assert_array_equal(stored.scale[g].numpy(), scale)
        np.testing.assert_array_equal(stored.minimum[g].numpy(), low.astype(np.float16))
        expected = expected.astype(np.float32) / scale.astype(np.float32) + low.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(found[first : first + group], expected)


def test_whole_groups_of_4_bits_take_four_and_a_half_bits() -> None:
    assert MinMax(4).quantize(gaussian(128, 5)).num_bits == 4.5 * 128 * 5


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_constant_group_comes_back(value: float) -> None:
    weight = torch.full((70, 3), value)
    assert torch.equal(dequantize(MinMax(4).quantize(weight)), weight)


def test_a_range_whose_scale_overflows_float16_is_kept() -> None:
    """At 4 bits that is a range below 15 / 65504; FlexGen's group would become its minimum."""
    weight = 0.25 + torch.linspace(0, 1e-4, 64)[:, None]
    error = (dequantize(MinMax(4).quantize(weight)) - weight).abs().max()
    assert error <= 0.5 / 65504 * 1.001


@given(st.floats(1e-3, 6e4), st.sampled_from([2, 3, 4, 8]))
def test_errors_are_at_most_half_a_step_and_the_rounding_of_its_numbers(largest: float, bits: int) -> None:
    weight = gaussian(64, 4).clamp(-3, 3) / 3 * largest
    span = weight.amax(0) - weight.amin(0)
    # The scale is at most the largest float16, so that steps are no smaller than its inverse.
    step = (span / (2**bits - 1)).clamp(min=1 / 65504)
    bound = step / 2 + 2**-11 * (span + weight.amin(0).abs())
    assert ((dequantize(MinMax(bits).quantize(weight)) - weight).abs() <= bound * 1.001).all()


@pytest.mark.parametrize(
    ("value", "problem"),
    [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (-70000.0, "larger than 65504")],
)
def test_what_cannot_be_stored_is_refused(value: float, problem: str) -> None:
    weight = gaussian(70, 3)
    weight[66, 1] = value
    with pytest.raises(UnsupportedModel, match=rf"w4-minmax.*1 of its numbers are {problem}.*row 66, column 1"):
        MinMax(4).quantize(weight)


@pytest.mark.parametrize("arguments", [(5, 64), (16, 64), (4, 0)])
def test_other_forms_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(PolicyError, match="2, 3, 4 or 8 bits"):
        MinMax(*arguments)

"""Columns of several widths against a plain reading of their layout, and at their edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression import minmax
from flexgen_helm.compression.columns import Columns, dequantize, quantize
from flexgen_helm.compression.packing import packed_rows, unpack
from flexgen_helm.errors import UnsupportedModel

LADDER = (4, 5, 6, 8)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def random_widths(num_columns: int) -> Tensor:
    chance = torch.Generator().manual_seed(num_columns)
    return torch.tensor(LADDER, dtype=torch.uint8)[torch.randint(4, (num_columns,), generator=chance)]


def read(stored: Columns, row: int, column: int, widths: list[int]) -> float:
    """One number as the layout says it, in Python's arithmetic."""
    num_rows, num_columns = stored.shape
    order = sorted(range(num_columns), key=lambda i: widths[i])
    same = [i for i in order if widths[i] == widths[column]]
    begin = sum(packed_rows(num_rows, widths[i]) for i in order if widths[i] < widths[column])
    height = packed_rows(num_rows, widths[column])
    block = stored.codes[begin : begin + height * len(same)].view(height, len(same))
    code = int(unpack(block, widths[column], num_rows)[row, same.index(column)])
    blocks = -(-num_rows // 64)
    group = order.index(column) * blocks + row // 64
    scale, minimum = (
        float(supers[group // 16]) * float(stored.unit) * int(unpack(shares[:, None], 6, blocks * num_columns)[group])
        for supers, shares in zip(stored.super_scales, stored.scales, strict=True)
    )
    return code * scale - minimum


@given(st.integers(1, 140), st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_numbers_are_those_of_the_layout(num_rows: int, num_columns: int) -> None:
    widths = random_widths(num_columns)
    stored = quantize(gaussian(num_rows, num_columns), widths, LADDER)
    found = dequantize(stored)
    for row in {0, num_rows // 2, num_rows - 1}:
        for column in range(num_columns):
            assert found[row, column].item() == pytest.approx(read(stored, row, column, widths.tolist()), rel=1e-5, abs=1e-6)


def test_the_error_falls_with_the_width_as_a_uniform_quantizers() -> None:
    """Each bit quarters the error; 6-bit scales take some of it from 8 bits. Rounding to 4 bits loses less than minmax."""
    weight, errors = gaussian(512, 64) / 30, []
    for width in LADDER:
        stored = quantize(weight, torch.full((64,), width, dtype=torch.uint8), LADDER)
        errors.append(float((dequantize(stored) - weight).square().sum()))
    assert errors[0] < float((minmax.dequantize(minmax.MinMax(4).quantize(weight)) - weight).square().sum())
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3
    assert errors[3] < errors[2] / 8


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_the_size_of_weights_does_not_matter(size: float) -> None:
    weight, widths = gaussian(100, 20), random_widths(20)
    factor = 2.0 ** round(torch.tensor(size).log2().item())
    expected = dequantize(quantize(weight, widths, LADDER)) * factor
    assert torch.equal(dequantize(quantize(weight * factor, widths, LADDER)), expected)


def test_columns_of_zeros_stay_zero_beside_others() -> None:
    weight = gaussian(130, 20)
    weight[:, ::3] = 0
    found = dequantize(quantize(weight, random_widths(20), LADDER))
    assert not found[:, ::3].any()
    assert torch.equal(dequantize(quantize(torch.zeros(130, 20), random_widths(20), LADDER)), torch.zeros(130, 20))


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (-0.5, -0.5), (0.25, 1.0), (-1.0, -0.25)])
def test_groups_on_one_side_of_zero(low: float, high: float) -> None:
    """A minimum is at most 0: positive groups are cut into steps from 0 on, negative ones over their own range."""
    weight = low + (high - low) * torch.rand(64, 16, generator=torch.Generator().manual_seed(0))
    widths = torch.full((16,), 8, dtype=torch.uint8)
    span = high if low > 0 else high - low
    bound = span / 255 + max(abs(low), abs(high)) / 63
    assert (dequantize(quantize(weight, widths, LADDER)) - weight).abs().max() <= bound


def test_all_bits_are_counted() -> None:
    """576 x 32: codes, 12 bits a group, 32 bits for 16 groups, 2 bits a column, 32 bits for the unit."""
    widths = random_widths(32)
    stored = quantize(gaussian(576, 32), widths, LADDER)
    assert stored.num_bits == 576 * int(widths.sum()) + 12 * 9 * 32 + 32 * 18 + 2 * 32 + 32


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = gaussian(64, 4)
    weight[3, 2] = float("inf")
    with pytest.raises(UnsupportedModel, match=r"NaN or infinite.*row 3, column 2"):
        quantize(weight, random_widths(4), LADDER)

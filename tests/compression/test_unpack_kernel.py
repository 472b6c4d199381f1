"""The compiled pass against the plain computation, by bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression import columns, minmax
from flexgen_helm.compression.allocation import LADDERS
from flexgen_helm.compression.unpack_kernel import unpack_columns, unpack_minmax
from flexgen_helm.machine.floats import KINDS

DTYPES = st.sampled_from(list(KINDS))
SIZES = st.sampled_from([1e-6, 0.02, 1.0, 3e4])
"""Subnormal float16 numbers, those of models, and some near the largest."""


def gaussian(num_rows: int, num_columns: int) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(num_rows * num_columns)).clamp(-2, 2)


def strided(num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    """A target in the middle of a larger matrix of ones."""
    return torch.ones(num_rows + 2, num_columns + 5, dtype=dtype)


@given(st.integers(1, 200), st.integers(1, 70), st.sampled_from(sorted(LADDERS)), DTYPES, SIZES)
@settings(max_examples=60, deadline=None)
def test_columns_are_those_of_dequantize(num_rows: int, num_columns: int, bits: int, dtype: torch.dtype, size: float) -> None:
    ladder = LADDERS[bits]
    chance = torch.Generator().manual_seed(num_rows)
    widths = torch.tensor(ladder, dtype=torch.uint8)[torch.randint(len(ladder), (num_columns,), generator=chance)]
    stored = columns.quantize(gaussian(num_rows, num_columns) * size, widths, ladder)
    whole = strided(num_rows, num_columns, dtype)
    unpack_columns(stored, whole[1:-1, 2:-3])
    expected = strided(num_rows, num_columns, dtype)
    expected[1:-1, 2:-3] = columns.dequantize(stored).to(dtype)
    assert torch.equal(whole, expected)


@given(st.integers(1, 200), st.integers(1, 70), st.sampled_from([2, 3, 4, 8]), st.sampled_from([64, 48]), DTYPES, SIZES)
@settings(max_examples=60, deadline=None)
def test_minmax_is_that_of_dequantize(
    num_rows: int, num_columns: int, bits: int, group: int, dtype: torch.dtype, size: float
) -> None:
    stored = minmax.MinMax(bits, group).quantize(gaussian(num_rows, num_columns) * size)
    whole = strided(num_rows, num_columns, dtype)
    unpack_minmax(stored, whole[1:-1, 2:-3])
    expected = strided(num_rows, num_columns, dtype)
    expected[1:-1, 2:-3] = minmax.dequantize(stored).to(dtype)
    assert torch.equal(whole, expected)

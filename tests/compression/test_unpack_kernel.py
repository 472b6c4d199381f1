"""The compiled pass against the plain computation, by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from flexgen_helm.compression import columns, minmax
from flexgen_helm.compression.allocation import LADDERS
from flexgen_helm.compression.unpack_kernel import KINDS, _from_half, _store, unpack_columns, unpack_minmax

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    """Every number of 16 bits, what lies half way to the next, and its neighbours."""
    exact = torch.arange(2**16).to(torch.uint16).view(dtype).float()
    exact = exact[exact.isfinite()]
    half = (exact.double() + torch.nextafter(exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)).double()) / 2
    half = half[half.isfinite()].float()
    numbers = torch.cat([exact, half, *(torch.nextafter(half, torch.tensor(x)) for x in (torch.inf, -torch.inf))])
    numbers = numbers[numbers.isfinite()]
    found = np.empty(len(numbers), np.uint16)
    _store(numbers.numpy(), found, KINDS[dtype])
    assert torch.equal(torch.from_numpy(found.view(np.int16)), numbers.to(dtype).view(torch.int16))


@njit(nogil=True)
def _all_from_half(source: Any, target: Any) -> None:
    for i in range(len(source)):
        target[i] = _from_half(source[i])


def test_every_finite_float16_is_read_as_torch_reads_it() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    found = np.empty(len(patterns), np.float32)
    _all_from_half(patterns, found)
    expected = torch.from_numpy(patterns.view(np.int16)).view(torch.float16).float()
    finite = expected.isfinite()
    assert torch.equal(torch.from_numpy(found)[finite], expected[finite])

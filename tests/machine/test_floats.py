"""Conversions of stored numbers against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexgen_helm.machine.floats import KINDS, bits_of_tensor, load_numbers, store_numbers


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
    store_numbers(numbers.numpy(), found, KINDS[dtype])
    assert torch.equal(torch.from_numpy(found.view(np.int16)), numbers.to(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_finite_number_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    every = torch.arange(2**16).to(torch.uint16)
    every = every.view(dtype) if dtype.itemsize == 2 else every.view(torch.bfloat16).float().nextafter(torch.tensor(1.0))
    found = np.empty(len(every), np.float32)
    load_numbers(bits_of_tensor(every), found, KINDS[dtype])
    expected = every.float()
    finite = expected.isfinite()
    assert torch.equal(torch.from_numpy(found).view(torch.int32)[finite], expected.view(torch.int32)[finite])

"""Codes in bytes: back to what they were, at the places that the layout promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression.packing import PLANES, pack, packed_rows, unpack


def random_codes(num_rows: int, num_columns: int, bits: int) -> Tensor:
    chance = torch.Generator().manual_seed(num_rows)
    return torch.randint(2**bits, (num_rows, num_columns), dtype=torch.uint8, generator=chance)


@given(st.integers(0, 200), st.integers(0, 9), st.sampled_from(sorted(PLANES)))
def test_codes_come_back(num_rows: int, num_columns: int, bits: int) -> None:
    codes = random_codes(num_rows, num_columns, bits)
    packed = pack(codes, bits)
    assert packed.shape == (packed_rows(num_rows, bits), num_columns)
    assert torch.equal(unpack(packed, bits, num_rows), codes)


@given(st.integers(1, 20), st.sampled_from(sorted(PLANES)))
def test_multiples_of_eight_rows_take_no_more_than_their_bits(eights: int, bits: int) -> None:
    assert pack(random_codes(8 * eights, 3, bits), bits).numel() * 8 == 8 * eights * 3 * bits


@pytest.mark.parametrize("bits", sorted(PLANES))
@pytest.mark.parametrize("num_rows", [64, 70, 128, 149])
def test_every_bit_is_where_the_layout_says(num_rows: int, bits: int) -> None:
    codes = random_codes(num_rows, 2, bits)
    packed = pack(codes, bits)
    for row in range(num_rows):
        block, r = divmod(row, 64)
        height = min(64, -(-num_rows // 8) * 8 - 64 * block)
        at, shift, found = block * 8 * bits, 0, torch.zeros(2, dtype=torch.int)
        for p in PLANES[bits]:
            step = height * p // 8
            found |= ((packed[at + r % step].int() >> (r // step * p)) & (2**p - 1)) << shift
            at, shift = at + step, shift + p
        assert torch.equal(found, codes[row].int())

"""Integers as bytes and back, and unpacked into weights, equal to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.compression import coding
from flexgen_helm.compression.coding import Decoder, decode, encode
from flexgen_helm.compression.entropy import Coded, Columns, StepRule, bits, dequantize, quantize_columns
from flexgen_helm.compression.entropy_kernel import FLOAT16, unpack_columns
from flexgen_helm.errors import CorruptFile
from tests.compression.matrices import make_matrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def coded_matrices(draw: st.DrawFn) -> Coded:
    rows, columns = draw(st.integers(1, 50)), draw(st.integers(1, 70))
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    integers = chance.integers(-127, 128, (rows, columns), dtype=np.int8)
    places = np.flatnonzero(chance.random(rows * columns) < draw(st.sampled_from([0, 0.01, 0.5])))
    values = chance.choice([-1, 1], len(places)) * chance.integers(128, 2**24, len(places))
    steps = (2.0 ** chance.uniform(-20, 2, columns)).astype(np.float16)
    classes = chance.integers(0, draw(st.integers(1, 64)), columns, dtype=np.uint8)
    # Products with factors of 2**-4 to 2**4 stay finite in fp32.
    factors = chance.integers(112, 145, rows if draw(st.booleans()) else 0, dtype=np.uint8)
    arrays = (integers, steps, classes, places.astype(np.int64), values.astype(np.int32), factors)
    return Coded(*(torch.from_numpy(x) for x in arrays))


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "BLOCK_WEIGHTS", 500)
    monkeypatch.setattr(coding, "FRAME_WEIGHTS", 60)


@given(coded_matrices())
@settings(max_examples=60, deadline=None)
def test_integers_come_back(coded: Coded) -> None:
    found = decode(encode(coded))
    for field in dataclasses.fields(Coded):
        assert torch.equal(getattr(found, field.name), getattr(coded, field.name))


@given(coded_matrices(), st.sampled_from(DTYPES), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_weights_are_unpacked_to_the_bit(coded: Coded, dtype: torch.dtype, chance) -> None:  # type: ignore[no-untyped-def]
    stored, decoder = encode(coded), Decoder()
    target = torch.full(coded.integers.shape, torch.nan, dtype=dtype)
    blocks = list(range(stored.layout.num_blocks))
    chance.shuffle(blocks)
    for block in blocks:
        decoder.unpack(stored, block, target)
    expected = dequantize(coded).to(dtype)
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))


def test_numbers_are_rounded_to_fp16_as_torch_does() -> None:
    """Among them those halfway between two fp16 numbers, subnormal ones, and those beyond the largest."""
    halves = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    middles = (halves[:-1].double() + halves[1:].double()).div(2).float()
    numbers = torch.cat(
        [halves, middles, *(middles.nextafter(torch.tensor(x)) for x in (0.0, 1e9)), torch.tensor([65519.99, 65520.0, 1e9])]
    )
    # As steps of one row of integers 1 and -1, exact in fp32.
    found = np.empty(2 * len(numbers), np.uint16)
    steps, integers = torch.cat([numbers, numbers]).numpy(), np.repeat(np.array([1, -1], np.int8), len(numbers))
    none, order = np.empty(0, np.int64), np.arange(len(steps), dtype=np.int32)
    unpack_columns(
        *(integers, np.array([len(steps)]), order, steps, np.empty(0, np.float32), none, none.astype(np.int32)),
        *(FLOAT16, np.empty(0, np.uint32), found),
    )
    expected = (torch.from_numpy(integers).float() * torch.from_numpy(steps)).half().view(torch.int16)
    assert torch.equal(torch.from_numpy(found.view(np.int16)), expected)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other header", "frames swapped"])
def test_damaged_frames_are_noticed(damage: str) -> None:
    weight, columns = make_matrix(40, 30)
    stored = encode(quantize_columns(weight, Columns.of("", weight, columns), StepRule(0.02, 1.0)))
    data, sizes = stored.data.clone(), stored.sizes
    if damage == "flipped":
        data[sizes[0] // 2] ^= 1
    elif damage == "cut":
        data, sizes = data[: sizes[0] - 3], (sizes[0] - 3,) * len(sizes)
    elif damage == "empty":
        data = data[:0]
    elif damage == "other header":
        data[:4] = 0
    else:
        assert stored.layout.widths[0] != stored.layout.widths[1]
        first, second, rest = data.split([*sizes[:2], sum(sizes[2:])])
        data, sizes = torch.cat([second, first, rest]), (sizes[1], sizes[0], *sizes[2:])
    with pytest.raises(CorruptFile, match="damaged"):
        decode(dataclasses.replace(stored, data=data, sizes=sizes))


def test_bytes_come_near_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Huffman code is within 0.0861 bits + the largest share of the entropy (Gallager 1978); tables and headers are small."""
    monkeypatch.undo()
    weight, columns = make_matrix(1024, 512)
    coded = quantize_columns(weight, Columns.of("", weight, columns), StepRule(0.005, float(columns.mean()) / 1024))
    stored = encode(coded)
    assert sum(stored.sizes) * 8 <= (bits([coded]) + 0.0861 + 0.1) * weight.numel()
    assert sum(stored.sizes) == stored.data.numel() < stored.num_bytes

"""16-bit weights in fewer bytes, equal to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression import lossless
from flexgen_helm.compression.lossless import Planes, decode_planes, encode_planes
from flexgen_helm.errors import CorruptFile, UnsupportedModel

DTYPES = [torch.bfloat16, torch.float16]


def all_patterns() -> Tensor:
    """Every number of 16 bits, NaN with all payloads among them."""
    return torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.uint8).copy())


def encoded(memory: Tensor, dtype: torch.dtype) -> Planes:
    """Codes numbers where there is room for any."""
    planes = encode_planes(memory, dtype, torch.empty(100 + 20 * len(memory), dtype=torch.uint8))
    assert planes is not None
    return planes


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_comes_back(dtype: torch.dtype) -> None:
    memory = all_patterns()
    planes = encoded(memory, dtype)
    found = torch.zeros_like(memory)
    decode_planes(planes, range(len(planes.sizes)), found)
    assert torch.equal(found, memory)


@given(st.binary(max_size=400).map(lambda x: x[: len(x) // 2 * 2]), st.sampled_from(DTYPES), st.integers(1, 50), st.data())
@settings(max_examples=60, deadline=None)
def test_frames_are_decoded_in_any_parts(content: bytes, dtype: torch.dtype, numbers: int, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lossless, "FRAME_NUMBERS", numbers)
        memory = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        planes = encoded(memory, dtype)
        count = len(planes.sizes)
        cut = data.draw(st.integers(0, count))
        found = torch.zeros_like(memory)
        decode_planes(planes, range(cut, count), found)
        assert not bool(found[: 2 * min(cut * numbers, planes.count)].any())
        decode_planes(planes, range(cut), found)
    assert torch.equal(found, memory)


def test_gaussian_weights_take_few_bits() -> None:
    """Exponents of a Gaussian have an entropy of 2.55 bits: half of the numbers that an octave ends lie in it, and so on."""
    weight = torch.randn(2**19, generator=torch.Generator().manual_seed(0)) * 0.02
    planes = encoded(weight.bfloat16().view(torch.uint8), torch.bfloat16)
    shares = torch.bincount(weight.bfloat16().view(torch.int16).int().bitwise_right_shift(7).bitwise_and(255)).double() / 2**19
    entropy = -float((shares * shares.clamp_min(1e-300).log2()).sum())
    assert 8 + entropy <= planes.memory.numel() * 8 / 2**19 <= 8 + entropy + 0.0861 + float(shares.max())


@pytest.mark.parametrize("missing", [0, 1])
def test_planes_take_no_more_than_the_room(missing: int) -> None:
    memory = all_patterns()
    expected = encoded(memory, torch.bfloat16).memory
    room = torch.full((len(expected) + 8,), 7, dtype=torch.uint8)
    found = encode_planes(memory, torch.bfloat16, room[: len(expected) - missing])
    assert (found is None) == bool(missing)
    assert missing or torch.equal(room[: len(expected)], expected)
    assert bool((room[len(expected) - missing :] == 7).all())


def test_what_is_damaged_is_noticed() -> None:
    memory = all_patterns()
    planes = encoded(memory, torch.bfloat16)
    found = torch.empty_like(memory)
    torn = dataclasses.replace(planes, memory=planes.memory[:-1])
    with pytest.raises(CorruptFile, match="torn"):
        decode_planes(torn, range(1), found)
    flipped = planes.memory.clone()
    flipped[planes.count + planes.sizes[0] // 2] ^= 4
    with pytest.raises(CorruptFile, match="damaged"):
        decode_planes(dataclasses.replace(planes, memory=flipped), range(1), found)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"float32.*bfloat16 and float16"):
        encoded(torch.zeros(8, dtype=torch.uint8), torch.float32)

"""FlexGen's form of K and V against its formula in NumPy, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.kv_cache.flexgen_format import FlexGenPart
from flexgen_helm.kv_cache.page_format import TokenPlaces, WritablePart, bits_per_element

CPU = torch.device("cpu")
BITS = st.sampled_from([2, 4, 8])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
HALF, F32 = np.float16, np.float32


def tokens_of(count: int, part: FlexGenPart, size: float = 1.0) -> Tensor:
    chance = torch.Generator().manual_seed(count * part.dim + part.num_heads)
    return (torch.randn(count, part.num_heads, part.dim, generator=chance).clamp(-3, 3) * size).to(part.dtype)


def expected_group(x: np.ndarray, bits: int) -> tuple[bytes, int, np.ndarray]:
    """The bytes of scale and minimum, the codes as one integer, and the values."""
    low, most = x.min(), F32(2**bits - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # FlexGen divides in torch, which multiplies by the rounded reciprocal.
        scale = min((F32(1) / (x.max() - low)) * most, F32(65504))
    codes = np.clip(np.rint((x - low) * scale), 0, most)
    integer = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return np.array([scale, low], HALF).tobytes(), integer, codes.astype(F32) / F32(HALF(scale)) + F32(HALF(low))


def expected_token(x: np.ndarray, bits: int) -> tuple[bytes, np.ndarray]:
    groups = [expected_group(x[i : i + 64], bits) for i in range(0, len(x), 64)]
    codes = sum(integer << (64 * bits * i) for i, (_, integer, _) in enumerate(groups))
    row = b"".join(numbers for numbers, _, _ in groups) + codes.to_bytes(-(-len(x) * bits // 8), "little")
    return row + bytes(len(row) % 2), np.concatenate([values for _, _, values in groups])


@given(st.integers(1, 3), st.one_of(st.sampled_from([64, 128]), st.integers(1, 140)), BITS, DTYPES)
@settings(max_examples=40, deadline=None)
def test_bytes_and_values_are_those_of_flexgens_formula(num_heads: int, dim: int, bits: int, dtype: torch.dtype) -> None:
    part = FlexGenPart(num_heads, dim, dtype, bits)
    new, stored = tokens_of(5, part), part.allocate(3, CPU)
    pages, tokens = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([31, 5, 0, 7, 4])
    part.write(stored, pages, tokens, new)
    found, gathered = part.read(stored, pages, tokens), part.gather(stored, torch.arange(3 * num_heads))
    gathered = gathered.view(3, num_heads, 32, dim)
    for i, (page, token) in enumerate(zip(pages, tokens, strict=True)):
        for head in range(num_heads):
            row, values = expected_token(new[i, head].float().numpy(), bits)
            assert stored[page, head, token].numpy().tobytes() == row
            assert torch.equal(found[i, head], torch.from_numpy(values).to(dtype))
            assert torch.equal(gathered[page, head, token], found[i, head])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unused_tokens_read_as_zeros(dtype: torch.dtype) -> None:
    part = FlexGenPart(2, 20, dtype, 4)
    stored = part.allocate(2, CPU)
    assert not part.gather(stored, torch.arange(4)).any()
    assert not part.read(stored, torch.tensor([0, 1]), torch.tensor([3, 31])).any()


@given(BITS, DTYPES, st.sampled_from([0.0, 1e-42, 1e-6, 1e4, 1e38]))
@settings(max_examples=30, deadline=None)
def test_torch_reads_the_same_bits_as_the_compiled_loop_and_nothing_overflows(
    bits: int, dtype: torch.dtype, size: float
) -> None:
    part = FlexGenPart(2, 70, dtype, bits)
    new = tokens_of(32, part, size).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    stored = part.allocate(1, CPU)
    part.write(stored, torch.zeros(32, dtype=torch.int64), torch.arange(32), new)
    found = part.gather(stored, torch.arange(2))
    assert found.isfinite().all()
    expected = part.decode(stored.flatten(0, 1)).to(dtype)
    assert torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


def test_copied_tokens_keep_their_bytes() -> None:
    """One token in some thousands becomes another when it is read in bfloat16 and quantised again."""
    part = FlexGenPart(8, 64, torch.bfloat16, 8)
    chance = torch.Generator().manual_seed(0)
    new = torch.randn(4096, 8, 64, generator=chance) + torch.randn(8, 64, generator=chance)
    source, target = part.allocate(128, CPU), part.allocate(128, CPU)
    pages, tokens = torch.arange(4096) // 32, torch.arange(4096) % 32
    part.write(source, pages, tokens, new.bfloat16())
    part.copy(TokenPlaces(source, pages, tokens), TokenPlaces(target, pages.flip(0), tokens))
    assert torch.equal(target[pages.flip(0), :, tokens], source[pages, :, tokens])


def test_it_is_written_token_by_token_and_counts_scales() -> None:
    part = FlexGenPart(2, 64, torch.float32, 4)
    _: WritablePart = part  # mypy compares the two
    assert bits_per_element(part) == 4.5
    assert bits_per_element(FlexGenPart(2, 128, torch.float32, 2)) == 2.5

"""Sealed pages against their formula in NumPy, byte by byte, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.kv_cache.minmax import largest
from flexgen_helm.kv_cache.page_format import PageFormat, PlainPart
from flexgen_helm.kv_cache.sealed_format import PerChannelPart, PerTokenPart, sealed_format

CPU = torch.device("cpu")
Part = PerChannelPart | PerTokenPart
FORMS = st.sampled_from([PerChannelPart, PerTokenPart])
BITS = st.sampled_from([2, 4, 8])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
DIMS = st.one_of(st.sampled_from([64, 80, 128]), st.integers(1, 140))
SIZES = st.sampled_from([1e-6, 1.0, 1e4])
CUT = 0.05
"""Share of a range at each end that codes of 2 bits leave out."""
BOTH = pytest.mark.parametrize("form", [PerChannelPart, PerTokenPart])


def exact_pages(count: int, part: Part, size: float = 1.0) -> Tensor:
    """Gaussian numbers with a mean of their own in each channel, one of which is constant."""
    chance = torch.Generator().manual_seed(count * part.dim + part.num_heads)
    x = torch.randn(count, part.num_heads, 32, part.dim, generator=chance).clamp(-3, 3)
    x += torch.randn(part.num_heads, 1, part.dim, generator=chance).clamp(-2, 2)
    x[..., part.dim // 2] = 0.3
    return (x * size).to(part.dtype)


def sealed(part: Part, exact: Tensor) -> Tensor:
    stored = part.allocate(len(exact), CPU)
    part.seal(stored, torch.arange(len(exact)), exact)
    return stored


def read(part: Part, stored: Tensor) -> Tensor:
    """All of some pages, ``[pages, num_heads, 32, dim]``."""
    found = part.gather(stored, torch.arange(len(stored) * part.num_heads))
    return found.view(len(stored), part.num_heads, 32, part.dim)


def to_bfloat16(x: np.float32, towards: int) -> np.float32:
    """The bfloat16 at or below (-1) or at or above (+1) a number: 8 significant bits, steps of 2**-133 at least."""
    step = 2.0 ** max(math.frexp(x)[1] - 8, -133)
    return np.float32((math.floor if towards < 0 else math.ceil)(float(x) / step) * step)


def expected_group(x: np.ndarray, bits: int, limit: float) -> tuple[bytes, int, np.ndarray]:
    """Of numbers that share a scale: the bytes of scale and zero, the codes as one integer, and the values."""
    x, most = x.clip(-limit, limit).astype(np.float32), np.float32(2**bits - 1)
    margin = (x.max() - x.min()) * np.float32(CUT if bits == 2 else 0)
    zero = to_bfloat16(x.min() + margin, -1)
    scale = to_bfloat16((x.max() - margin - zero) / most, 1)
    codes = np.clip(np.rint((x - zero) / scale), 0, most) if scale > 0 else np.zeros_like(x)
    halves = (np.array([scale, zero], np.float32) + np.float32(0)).view(np.uint32) >> 16
    integer = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return halves.astype("<u2").tobytes(), integer, codes.astype(np.float32) * scale + zero


def expected_channels(x: np.ndarray, bits: int, limit: float) -> tuple[bytes, np.ndarray]:
    """A head of a page of K, ``[32, dim]``."""
    numbers, codes, values = zip(*(expected_group(channel, bits, limit) for channel in x.T), strict=True)
    return b"".join(numbers) + b"".join(c.to_bytes(4 * bits, "little") for c in codes), np.stack(values, 1)


def expected_tokens(x: np.ndarray, bits: int, limit: float) -> tuple[bytes, np.ndarray]:
    """A head of a page of V, ``[32, dim]``."""
    rows, values = [], []
    for token in x:
        groups = [expected_group(token[i : i + 64], bits, limit) for i in range(0, len(token), 64)]
        codes = sum(integer << (64 * bits * i) for i, (_, integer, _) in enumerate(groups))
        row = b"".join(numbers for numbers, _, _ in groups) + codes.to_bytes(-(-len(token) * bits // 8), "little")
        rows.append(row + bytes(len(row) % 2))
        values.append(np.concatenate([group_values for _, _, group_values in groups]))
    return b"".join(rows), np.stack(values)


@given(FORMS, st.integers(1, 3), DIMS, BITS, DTYPES, SIZES)
@settings(max_examples=60, deadline=None)
def test_bytes_and_values_are_those_of_the_formula(
    form: type[Part], num_heads: int, dim: int, bits: int, dtype: torch.dtype, size: float
) -> None:
    part = form(num_heads, dim, dtype, bits)
    exact = exact_pages(2, part, size)
    stored, found = sealed(part, exact), read(part, sealed(part, exact))
    rule = expected_channels if form is PerChannelPart else expected_tokens
    for page in range(2):
        for head in range(num_heads):
            expected, values = rule(exact[page, head].float().numpy(), bits, largest(dtype))
            assert stored[page, head].numpy().tobytes() == expected
            assert torch.equal(found[page, head], torch.from_numpy(values).to(dtype))


@given(FORMS, st.integers(1, 3), DIMS, BITS, DTYPES, st.sampled_from([0.0, 1e-42, 1e-6, 1.0, 1e5, 1e38]))
@settings(max_examples=60, deadline=None)
def test_torch_computes_the_same_bits_as_the_compiled_loops(
    form: type[Part], num_heads: int, dim: int, bits: int, dtype: torch.dtype, size: float
) -> None:
    part = form(num_heads, dim, dtype, bits)
    exact = exact_pages(3, part, size).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    stored = sealed(part, exact)
    assert torch.equal(part.encode(exact), stored)
    expected = part.decode(stored.flatten(0, 1)).to(dtype)
    assert torch.equal(read(part, stored).flatten().view(torch.uint8), expected.flatten().view(torch.uint8))


@pytest.mark.gpu
@BOTH
def test_a_gpu_seals_and_reads_the_same_bits(form: type[Part]) -> None:
    part, gpu = form(2, 70, torch.bfloat16, 4), torch.device("cuda")
    exact = exact_pages(3, part)
    stored = part.allocate(3, gpu)
    part.seal(stored, torch.arange(3, device=gpu), exact.to(gpu))
    from_host = part.allocate(3, gpu)
    part.seal(from_host, torch.arange(3, device=gpu), exact)
    assert torch.equal(stored.cpu(), sealed(part, exact))
    assert torch.equal(from_host.cpu(), sealed(part, exact))
    rows = torch.arange(6, device=gpu)
    assert torch.equal(part.gather(stored, rows).cpu().view(3, 2, 32, 70), read(part, sealed(part, exact)))


@given(FORMS, DIMS, BITS, DTYPES, SIZES)
@settings(max_examples=40, deadline=None)
def test_errors_are_at_most_half_the_scale_and_what_is_cut(
    form: type[Part], dim: int, bits: int, dtype: torch.dtype, size: float
) -> None:
    part = form(1, dim, dtype, bits)
    exact = exact_pages(1, part, size)
    x, values = exact[0, 0].double(), read(part, sealed(part, exact))[0, 0].double()
    ranges = x.T if form is PerChannelPart else x
    for numbers, own in zip(ranges, values.T if form is PerChannelPart else values, strict=True):
        for i in range(0, len(numbers), 32 if form is PerChannelPart else 64):
            group, of_group = numbers[i : i + 64], own[i : i + 64]
            # Rounding to bfloat16 moves the zero by 2**-7 of the minimum at most, and the scale by 2**-7 of itself.
            spread = group.max() - group.min() + group.min().abs() * 2**-7
            cut = CUT if bits == 2 else 0.0
            half_a_scale = spread / (2**bits - 1) * (1 + 2**-7) / 2 + cut * spread + 2.0**-133
            rounding = (
                torch.finfo(dtype).eps * (group.abs().max() + 2 * half_a_scale) + torch.finfo(dtype).smallest_normal * 1e-3
            )
            assert (of_group - group).abs().max() <= half_a_scale + rounding


@BOTH
def test_bytes_depend_on_no_neighbour(form: type[Part]) -> None:
    part = form(3, 70, torch.float32, 4)
    exact = exact_pages(6, part)
    together = sealed(part, exact)
    apart = part.allocate(9, CPU)
    for page, target in enumerate((8, 1, 4, 0, 3, 6)):
        part.seal(apart, torch.tensor([target]), exact[page : page + 1])
    assert torch.equal(apart[[8, 1, 4, 0, 3, 6]], together)
    assert not apart[[2, 5, 7]].any()
    one_head = form(1, 70, torch.float32, 4)
    for head in range(3):
        assert torch.equal(sealed(one_head, exact[:, head : head + 1]), together[:, head : head + 1])


def test_a_token_of_v_depends_on_no_other_token() -> None:
    part = PerTokenPart(2, 70, torch.float32, 4)
    exact = exact_pages(1, part)
    stored = sealed(part, exact)
    assert torch.equal(sealed(part, exact.flip(2)), stored.flip(2))


@BOTH
@pytest.mark.parametrize("negative", [(slice(None), slice(None)), (slice(0, 32, 2), slice(1, 64, 3)), (31, 63), (0, 0)])
def test_signs_of_zeros_change_no_byte(form: type[Part], negative: tuple[slice | int, slice | int]) -> None:
    part = form(1, 64, torch.float32, 4)
    exact = torch.zeros(1, 1, 32, 64)
    exact[..., *negative] = -0.0
    stored = sealed(part, exact)
    assert not stored.any()
    assert torch.equal(part.encode(exact), stored)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unused_pages_read_as_zeros(form: type[Part], dtype: torch.dtype) -> None:
    part = form(3, 20, dtype, 2)
    stored = part.allocate(4, CPU)
    assert stored.nbytes == 4 * part.num_bytes
    assert not read(part, stored).any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, 0.3, -1234.567, 2.0**-20, 2.0**-140])
def test_equal_numbers_come_back(form: type[Part], dtype: torch.dtype, value: float) -> None:
    part = form(1, 70, dtype, 4)
    exact = torch.full((1, 1, 32, 70), value).to(dtype)
    error = (read(part, sealed(part, exact)).double() - exact.double()).abs().max()
    # The scale spans what rounding took from the zero. So it misses the number by its own rounding and the dtype's.
    assert error <= abs(value) * (2**-7 * 2**-7 + torch.finfo(dtype).eps) + 2.0**-133


@BOTH
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_largest_numbers_stay_finite(form: type[Part], bits: int, dtype: torch.dtype) -> None:
    part = form(1, 64, dtype, bits)
    most = torch.finfo(dtype).max
    for low, high in ((-most, most), (most, most), (-most, -most), (-most, 0.0), (-1.0, most)):
        exact = torch.full((1, 1, 32, 64), low, dtype=dtype)
        exact[..., ::2, ::2] = high
        found = read(part, sealed(part, exact))
        assert found.isfinite().all()
        limited = exact.double().clamp(-largest(dtype), largest(dtype))
        spread = limited.max() - limited.min() + limited.abs().max() * 2**-7
        cut = CUT if bits == 2 else 0.0
        assert (found.double() - limited).abs().max() <= spread * (0.51 / (2**bits - 1) + cut) + limited.abs().max() * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_as_large_as_attention_allows_keep_half_a_scale(dtype: torch.dtype) -> None:
    part = PerChannelPart(1, 8, dtype, 8)
    exact = exact_pages(1, part).clamp(-1, 1) * 2**58
    error = (read(part, sealed(part, exact)).double() - exact.double()).abs().max()
    assert error <= 2**58 * (2 / 255 / 2 * 1.02 + torch.finfo(dtype).eps)


@BOTH
def test_chosen_rows_are_gathered_into_what_is_given(form: type[Part]) -> None:
    part = form(3, 24, torch.bfloat16, 4)
    stored = sealed(part, exact_pages(5, part))
    every = read(part, stored).view(15, -1)
    rows = torch.tensor([14, 0, 7, 7, 3])
    out = torch.full((5, 32 * 24), torch.nan, dtype=torch.bfloat16)
    assert part.gather(stored, rows, out) is out
    assert torch.equal(out, every[rows])


@BOTH
def test_bytes_of_a_transfer_are_pages(form: type[Part]) -> None:
    part = form(3, 21, torch.float32, 4)
    stored = sealed(part, exact_pages(4, part))
    records = torch.cat([stored.flatten(1), torch.zeros(4, 64, dtype=torch.uint8)], 1)
    arrived = part.allocate(4, CPU)
    arrived.copy_(part.view(records[:, : part.num_bytes]))
    assert torch.equal(arrived, stored)


@pytest.mark.parametrize(
    ("k_bits", "v_bits", "dim", "expected"),
    [
        (4, 4, 64, (5.0, 4.5)),  # a scale and a zero of 16 bits each for 32 tokens of K, and for 64 elements of V
        (2, 2, 128, (3.0, 2.5)),
        (8, 8, 64, (9.0, 8.5)),
        (4, 2, 96, (5.0, 2 + 2 * 32 / 96)),
        (4, 16, 64, (5.0, 32.0)),
        (2, 2, 7, (3.0, 8 * 6 / 7)),  # 4 bytes of numbers and 14 bits of codes
        (2, 8, 7, (3.0, 8 * 12 / 7)),  # 4 + 7 bytes, and one that makes their number even
    ],
)
def test_bits_of_an_element_count_scales(k_bits: int, v_bits: int, dim: int, expected: tuple[float, float]) -> None:
    exact = PageFormat.plain(torch.zeros(1, 2, dim), torch.zeros(1, 2, dim))
    found = sealed_format(exact, k_bits=k_bits, v_bits=v_bits)
    assert found.bits_per_element == pytest.approx(expected)
    assert exact.bits_per_element == (32.0, 32.0)


def test_what_is_not_quantised_is_sealed_as_it_is() -> None:
    exact = PageFormat.plain(torch.zeros(1, 2, 8), torch.zeros(1, 2, 6))
    form = sealed_format(exact, k_bits=16, v_bits=4)
    assert form == PageFormat(PlainPart(2, 8, torch.float32), PerTokenPart(2, 6, torch.float32, 4))
    tensors = form.allocate(3, CPU)
    k, v = torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 6)
    for (part, stored), x in zip(tensors.sealable_parts, (k, v), strict=True):
        part.seal(stored, torch.tensor([1]), x)
    assert torch.equal(tensors.k[1], k[0])
    assert tensors.v[1].any()
    assert not tensors.v[[0, 2]].any()

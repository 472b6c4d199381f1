"""Sealing pages on the CPU, compiled by Numba: what `sealed_format` computes by torch, with equal bits and without the GIL."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from flexgen_helm.kv_cache.minmax import cut_of
from flexgen_helm.kv_cache.pages import PAGE_TOKENS
from flexgen_helm.kv_cache.token_rows import GROUP, NUMBER_BYTES
from flexgen_helm.machine.compiled import compiled, size
from flexgen_helm.machine.floats import KINDS, bits_of, bits_of_tensor, load_numbers, number_of

f32, u8, u16, u32 = np.float32, np.uint8, np.uint16, np.uint32
TOKENS = size(PAGE_TOKENS)
ZERO, ONE = f32(0), f32(1)
Array = Any
"""A NumPy array; its shape is in the docstring."""


def seal_channels(stored: Tensor, pages: Tensor, exact: Tensor, bits: int, limit: float) -> None:
    """Quantise whole pages of K.

    Args:
        stored: uint8 ``[pages, num_heads, head_bytes]``, contiguous, changed.
        pages: int64 ``[n]``.
        exact: ``[n, num_heads, 32, dim]``.
        bits: Bits of a code.
        limit: See `flexgen_helm.kv_cache.minmax.largest`.
    """
    found = bits_of_tensor(exact.contiguous().flatten(2)), KINDS[exact.dtype]
    _seal_channels(stored.numpy(), stored.numpy().view(u16), pages.numpy(), *found, bits, f32(limit), f32(cut_of(bits)))


def seal_tokens(stored: Tensor, pages: Tensor, exact: Tensor, bits: int, limit: float) -> None:
    """Quantise whole pages of V.

    Args:
        stored: uint8 ``[pages, num_heads, 32, row bytes]``, contiguous, changed.
        pages: int64 ``[n]``.
        exact: ``[n, num_heads, 32, dim]``.
        bits: Bits of a code.
        limit: See `flexgen_helm.kv_cache.minmax.largest`.
    """
    found = bits_of_tensor(exact.contiguous()), KINDS[exact.dtype]
    _seal_tokens(stored.numpy(), stored.numpy().view(u16), pages.numpy(), *found, bits, f32(limit), f32(cut_of(bits)))


@njit(nogil=True)
def _round_down(x):  # type: ignore[no-untyped-def]
    """The bfloat16 at or below a float32, as float32; 0 for -0."""
    bits = bits_of(x + ZERO)
    towards_zero = u32(bits & u32(0xFFFF0000))
    return number_of(u32(towards_zero + u32(0x10000)) if x < ZERO and bits != towards_zero else towards_zero)


@njit(nogil=True)
def _round_up(x):  # type: ignore[no-untyped-def]
    """The bfloat16 at or above a float32 of at least 0, as float32; 0 for -0."""
    return number_of(u32((bits_of(x + ZERO) + u32(0xFFFF)) & u32(0xFFFF0000)))


@njit(nogil=True)
def _upper_half(x):  # type: ignore[no-untyped-def]
    return u16(bits_of(x) >> u32(16))


@njit(nogil=True, error_model="numpy")
def _code(x, zero, scale, most):  # type: ignore[no-untyped-def]
    return u8(np.int32(min(max(np.rint((x - zero) / (scale if scale > ZERO else ONE)), ZERO), most)))


@njit(nogil=True)
def _clamped(numbers: Array, limit: Any) -> None:
    for i in range(size(len(numbers))):
        numbers[i] = min(max(numbers[i], -limit), limit)


@njit(nogil=True)
def _pack(codes, bits, packed, begin, count):  # type: ignore[no-untyped-def]
    """Pack uint8 ``[count * 8 / bits]`` to ``count`` bytes."""
    if bits == size(8):
        for i in range(count):
            packed[begin + i] = codes[i]
    elif bits == size(4):
        for i in range(count):
            packed[begin + i] = codes[size(2) * i] | (codes[size(2) * i + size(1)] << u8(4))
    else:
        for i in range(count):
            low = codes[size(4) * i] | (codes[size(4) * i + size(1)] << u8(2))
            packed[begin + i] = low | (codes[size(4) * i + size(2)] << u8(4)) | (codes[size(4) * i + size(3)] << u8(6))


@njit(nogil=True, error_model="numpy")
def _scaled(low, high, most, cut):  # type: ignore[no-untyped-def]
    """Find zero and scale of numbers from low to high."""
    margin = (high - low) * cut
    zero = _round_down(low + margin)
    return zero, _round_up((high - margin - zero) / most)


@njit(nogil=True, error_model="numpy")
def _channel_ranges(numbers, most, cut, zero, scale):  # type: ignore[no-untyped-def]
    """Find scale and zero ``[dim]`` of channels ``[32 * dim]``."""
    dim = size(len(zero))
    for d in range(dim):
        zero[d] = scale[d] = numbers[d]
    for t in range(size(1), TOKENS):
        for d in range(dim):
            zero[d] = min(zero[d], numbers[t * dim + d])
            scale[d] = max(scale[d], numbers[t * dim + d])
    for d in range(dim):
        zero[d], scale[d] = _scaled(zero[d], scale[d], most, cut)


@compiled
def _seal_channels(stored, halves, pages, exact, kind, num_bits, limit, cut):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """See `seal_channels`; stored is also given as uint16, exact as ``[n, num_heads, 32 * dim]``."""
    dim, bits = size(exact.shape[2]) // TOKENS, size(num_bits)
    most, count = f32((size(1) << bits) - size(1)), TOKENS * bits // size(8)
    numbers, codes, channel = np.empty(TOKENS * dim, f32), np.empty(TOKENS * dim, u8), np.empty(PAGE_TOKENS, u8)
    zero, scale = np.empty(dim, f32), np.empty(dim, f32)
    for n in range(len(pages)):
        for h in range(exact.shape[1]):
            load_numbers(exact[n, h], numbers, kind)
            _clamped(numbers, limit)
            _channel_ranges(numbers, most, cut, zero, scale)
            for t in range(TOKENS):
                for d in range(dim):
                    codes[t * dim + d] = _code(numbers[t * dim + d], zero[d], scale[d], most)
            head, head_halves = stored[pages[n], h], halves[pages[n], h]
            for d in range(dim):
                head_halves[size(2) * d], head_halves[size(2) * d + size(1)] = _upper_half(scale[d]), _upper_half(zero[d])
            for d in range(dim):
                for t in range(TOKENS):
                    channel[t] = codes[t * dim + d]
                _pack(channel, bits, head, size(NUMBER_BYTES) * dim + d * count, count)


@njit(nogil=True, fastmath={"nnan", "nsz"})
def _range(numbers, first, end):  # type: ignore[no-untyped-def]
    """Find the smallest and the largest number; which zero it is does not matter."""
    low = high = numbers[first]
    for i in range(first, end):
        low, high = min(low, numbers[i]), max(high, numbers[i])
    return low, high


@compiled
def _seal_tokens(stored, halves, pages, exact, kind, num_bits, limit, cut):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """See `seal_tokens`; stored is also given as uint16."""
    dim, bits = size(exact.shape[3]), size(num_bits)
    most, groups = f32((size(1) << bits) - size(1)), (dim + size(GROUP - 1)) // size(GROUP)
    count = (dim * bits + size(7)) // size(8)
    numbers, codes = np.empty(dim, f32), np.zeros(count * size(8) // bits, u8)
    for n in range(len(pages)):
        for h in range(exact.shape[1]):
            for t in range(PAGE_TOKENS):
                load_numbers(exact[n, h, t], numbers, kind)
                _clamped(numbers, limit)
                row, row_halves = stored[pages[n], h, t], halves[pages[n], h, t]
                for g in range(groups):
                    first, end = size(GROUP) * g, min(size(GROUP) * (g + size(1)), dim)
                    low, high = _range(numbers, first, end)
                    zero, scale = _scaled(low, high, most, cut)
                    row_halves[size(2) * g], row_halves[size(2) * g + size(1)] = _upper_half(scale), _upper_half(zero)
                    for i in range(first, end):
                        codes[i] = _code(numbers[i], zero, scale, most)
                row[len(row) - 1] = 0  # nothing else fills an odd row up
                _pack(codes, bits, row, size(NUMBER_BYTES) * groups, count)

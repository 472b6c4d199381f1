"""Reading quantised pages on the CPU, compiled by Numba: what formats compute by torch, with equal bits and without the GIL."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor

from flexgen_helm.kv_cache.pages import PAGE_TOKENS
from flexgen_helm.kv_cache.token_rows import GROUP, NUMBER_BYTES
from flexgen_helm.machine.compiled import compiled, size
from flexgen_helm.machine.floats import KINDS, bits_of_tensor, from_bfloat16, from_half, store_numbers

f32, u8, u16, u32, u64 = np.float32, np.uint8, np.uint16, np.uint32, np.uint64
TOKENS = size(PAGE_TOKENS)
SIDE = size(8)
"""Bytes of a word, and words that are transposed together."""
SWAPS = (
    (size(4), u64(32), u64(0x00000000FFFFFFFF)),
    (size(2), u64(16), u64(0x0000FFFF0000FFFF)),
    (size(1), u64(8), u64(0x00FF00FF00FF00FF)),
)
"""Steps that transpose 8 words of 8 bytes: between which words, and which bytes of them, are exchanged."""
EACH_BYTE = u64(0x0101010101010101)
ZERO, ONE = f32(0), f32(1)
Array = Any
"""A NumPy array; its shape is in the docstring."""


def gather_channels(heads: Tensor, rows: Tensor, out: Tensor, bits: int) -> None:
    """Dequantise sealed K.

    Args:
        heads: uint8 ``[pages * num_heads, head_bytes]``, contiguous.
        rows: int64 ``[n]``: which of them.
        out: ``[n, 32 * dim]`` in float32, bfloat16 or float16, contiguous, filled.
        bits: Bits of a code.
    """
    words = heads.numpy().view(u32)
    _gather_channels(words, heads.numpy().view(u16), rows.numpy(), bits_of_tensor(out), KINDS[out.dtype], bits)


def gather_tokens(tokens: Tensor, rows: Tensor, out: Tensor, bits: int, *, flexgen: bool) -> None:
    """Dequantise V whose tokens are each a `flexgen_helm.kv_cache.token_rows.TokenRow`.

    Args:
        tokens: uint8 ``[pages * num_heads, 32, row bytes]``, contiguous.
        rows: int64 ``[n]``: which of the first dimension.
        out: ``[n, 32 * dim]`` in float32, bfloat16 or float16, contiguous, filled.
        bits: Bits of a code.
        flexgen: Whether numbers are those of FlexGen: float16, and codes are divided by the scale.
    """
    arrays = tokens.numpy(), tokens.numpy().view(u16), rows.numpy(), bits_of_tensor(out)
    _gather_tokens(*arrays, KINDS[out.dtype], bits, flexgen)


@njit(nogil=True)
def _transpose(block: Array, lanes: int) -> None:
    """Transpose squares of 8 times 8 bytes, word i of each of which is in ``block[i * lanes :]``."""
    for distance, shift, mask in SWAPS:
        for i in range(SIDE):
            if i & distance == size(0):
                low, high = i * lanes, (i + distance) * lanes
                for j in range(lanes):
                    moved = ((block[low + j] >> shift) ^ block[high + j]) & mask
                    block[high + j] ^= moved
                    block[low + j] ^= moved << shift


@njit(nogil=True)
def _unpack_channels(words, begin, dim, bits, block, codes):  # type: ignore[no-untyped-def]
    """Unpack the codes of a head, token after token.

    Args:
        words: uint32, flat: packed codes, channel after channel.
        begin: Where they begin.
        dim: Channels.
        bits: Bits of a code.
        block: uint64 ``[8 * dim8 / 8 * bits / 2]``, overwritten; dim8 is dim, rounded up to a multiple of 8.
        codes: uint64 ``[32 * dim8 / 8]``, filled: 8 codes each.
    """
    columns, words_each, in_byte = (dim + size(7)) // SIDE, bits // size(2), size(8) // bits
    lanes = columns * words_each
    for d in range(columns * SIDE):
        for w in range(words_each):
            at, to = begin + d * bits + size(2) * w, d % SIDE * lanes + w * columns + d // SIDE
            block[to] = u64(words[at]) | (u64(words[at + size(1)]) << u64(32)) if d < dim else u64(0)
    _transpose(block, lanes)
    mask = EACH_BYTE * u64((size(1) << bits) - size(1))
    for w in range(words_each):
        for byte in range(SIDE):
            source = byte * lanes + w * columns
            for k in range(in_byte):
                target = ((SIDE * w + byte) * in_byte + k) * columns
                for c in range(columns):
                    codes[target + c] = (block[source + c] >> (k * bits)) & mask


@compiled
def _gather_channels(words, halves, rows, out, kind, num_bits):  # type: ignore[no-untyped-def]
    """See `gather_channels`; heads are ``words`` and ``halves``, the same memory as uint32 and as uint16."""
    dim, bits = size(out.shape[1]) // TOKENS, size(num_bits)
    width = (dim + size(7)) // SIDE * SIDE
    block, codes = np.empty(width * bits // size(2), u64), np.empty(TOKENS * width // SIDE, u64)
    codes_of_bytes = codes.view(u8)
    scale, zero, numbers = np.empty(dim, f32), np.empty(dim, f32), np.empty(TOKENS * dim, f32)
    flat_words, flat_halves = words.reshape(-1), halves.reshape(-1)
    for n in range(len(rows)):
        head = size(rows[n])
        begin = head * size(halves.shape[1])
        for d in range(dim):
            scale[d] = from_bfloat16(flat_halves[begin + size(2) * d])
            zero[d] = from_bfloat16(flat_halves[begin + size(2) * d + size(1)])
        _unpack_channels(flat_words, head * size(words.shape[1]) + dim, dim, bits, block, codes)
        for t in range(TOKENS):
            for d in range(dim):
                numbers[t * dim + d] = f32(codes_of_bytes[t * width + d]) * scale[d] + zero[d]
        store_numbers(numbers, out[n], kind)


@njit(nogil=True)
def _unpack_token(packed, begin, count, bits, codes):  # type: ignore[no-untyped-def]
    """Unpack ``count`` bytes of codes to uint8 ``[count * 8 / bits]``."""
    if bits == size(8):
        for i in range(count):
            codes[i] = packed[begin + i]
    elif bits == size(4):
        for i in range(count):
            codes[size(2) * i], codes[size(2) * i + size(1)] = packed[begin + i] & u8(15), packed[begin + i] >> u8(4)
    else:
        for i in range(count):
            byte = packed[begin + i]
            codes[size(4) * i], codes[size(4) * i + size(1)] = byte & u8(3), (byte >> u8(2)) & u8(3)
            codes[size(4) * i + size(2)], codes[size(4) * i + size(3)] = (byte >> u8(4)) & u8(3), byte >> u8(6)


@compiled
def _gather_tokens(packed, halves, rows, out, kind, num_bits, flexgen):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """See `gather_tokens`; tokens are ``packed`` and ``halves``, the same memory as uint8 and as uint16."""
    dim, bits = size(out.shape[1]) // TOKENS, size(num_bits)
    groups, count = (dim + size(GROUP - 1)) // size(GROUP), (dim * bits + size(7)) // size(8)
    codes, numbers = np.empty(count * size(8) // bits, u8), np.empty(TOKENS * dim, f32)
    flat, flat_halves = packed.reshape(-1), halves.reshape(-1)
    for n in range(len(rows)):
        for t in range(TOKENS):
            token = size(rows[n]) * TOKENS + t
            begin = token * size(halves.shape[2])
            _unpack_token(flat, size(2) * begin + size(NUMBER_BYTES) * groups, count, bits, codes)
            for g in range(groups):
                first, second = flat_halves[begin + size(2) * g], flat_halves[begin + size(2) * g + size(1)]
                at = t * dim
                if flexgen:
                    _divide(codes, from_half(first), from_half(second), size(GROUP) * g, numbers, at, dim)
                else:
                    _multiply(codes, from_bfloat16(first), from_bfloat16(second), size(GROUP) * g, numbers, at, dim)
        store_numbers(numbers, out[n], kind)


@njit(nogil=True)
def _multiply(codes, scale, zero, first, numbers, at, dim):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    for i in range(first, min(first + size(GROUP), dim)):
        numbers[at + i] = f32(codes[i]) * scale + zero


@njit(nogil=True, error_model="numpy")
def _divide(codes, scale, minimum, first, numbers, at, dim):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    divisor = scale if scale > ZERO else ONE
    for i in range(first, min(first + size(GROUP), dim)):
        numbers[at + i] = f32(codes[i]) / divisor + minimum

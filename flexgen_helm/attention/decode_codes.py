"""Codes of sealed pages into fp32, compiled by Numba for `flexgen_helm.attention.decode_kernel`.

The value of a code is ``code * scale + zero`` in fp32: the product is rounded, then the sum. So all-zero bytes read as 0.

* Sealed K of a head: ``[D, 2]`` bfloat16 (scale, zero) of each channel, then ``[D, 4 * bits]`` uint8: a channel's 32 codes.
* Sealed V of a head: 32 rows of a token each: ``[G, 2]`` bfloat16 (scale, zero) of its G groups of at most 64 numbers, then
  ``ceil(Dv * bits / 8)`` bytes of codes; a row has an even number of bytes.

Codes of 2, 4 or 8 bits are packed little-endian: the lowest bits of a byte come first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from flexgen_helm.attention.decode_intrinsics import FLOAT, LANES, WORD, array_at, pointer_to, repeated
from flexgen_helm.kv_cache.pages import PAGE_TOKENS

GROUP = 64
"""Numbers of a token of V that share scale and zero."""
FACTOR_BYTES = 4
"""Bytes of a scale and a zero."""
BYTE, HALF = ir.IntType(8), ir.IntType(16)


def _factors(builder: Any, address: Any) -> tuple[Any, Any]:
    """The scale and the zero that are stored at an address, in fp32."""
    halves = builder.load(pointer_to(builder, address, ir.VectorType(HALF, 2)), align=2)
    pair = ir.VectorType(WORD, 2)
    words = builder.shl(builder.zext(halves, pair), ir.Constant(pair, [16, 16]))
    numbers = builder.bitcast(words, ir.VectorType(FLOAT, 2))
    return builder.extract_element(numbers, WORD(0)), builder.extract_element(numbers, WORD(1))


def _spread(builder: Any, packed: Any, bits: int) -> Any:
    """Bytes of packed codes as one code a byte, in order."""
    kind, num_bytes = packed.type, packed.type.count

    def constant(x: int) -> Any:
        return ir.Constant(kind, [x] * num_bytes)

    shifted = [builder.lshr(packed, constant(shift)) for shift in range(0, 8, bits)]
    parts = [builder.and_(x, constant(2**bits - 1)) for x in shifted]
    while len(parts) > 1:
        half, n = len(parts) // 2, parts[0].type.count
        deal = ir.Constant(
            ir.VectorType(WORD, 2 * n), [i for pair in zip(range(n), range(n, 2 * n), strict=True) for i in pair]
        )
        parts = [builder.shuffle_vector(a, b, deal) for a, b in zip(parts[:half], parts[half:], strict=True)]
    return parts[0]


def _decoding(bits: int, width: int) -> Any:
    """A function that decodes as many neighbouring codes.

    Args of what is returned: address of scale and zero; address of the codes; target, fp32, flat; its first number.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        factors, codes, target, first = arguments
        scale, zero = (repeated(builder, x, width) for x in _factors(builder, factors))
        packed = builder.load(pointer_to(builder, codes, ir.VectorType(BYTE, width * bits // 8)), align=1)
        wide = builder.zext(_spread(builder, packed, bits), ir.VectorType(WORD, width))
        numbers = builder.sitofp(wide, ir.VectorType(FLOAT, width))
        # Without flags LLVM keeps both roundings.
        numbers = builder.fadd(builder.fmul(numbers, scale), zero)
        data = context.make_array(signature.args[2])(context, builder, target).data
        at = builder.bitcast(builder.gep(data, [first]), ir.VectorType(FLOAT, width).as_pointer())
        builder.store(numbers, at, align=4)
        return context.get_dummy_value()

    def typed(typing_context: Any, factors: Any, codes: Any, target: Any, first: Any) -> Any:
        return types.void(factors, codes, target, first), generate

    return intrinsic(typed)


_page_2, _page_4, _page_8 = (_decoding(bits, PAGE_TOKENS) for bits in (2, 4, 8))
_group_2, _group_4, _group_8 = (_decoding(bits, GROUP) for bits in (2, 4, 8))
_some_2, _some_4, _some_8 = (_decoding(bits, LANES) for bits in (2, 4, 8))


def _single(typing_context: Any, factors: Any, code: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scale, zero = _factors(builder, arguments[0])
        return builder.fadd(builder.fmul(builder.sitofp(arguments[1], FLOAT), scale), zero)

    return types.float32(factors, code), generate


_number: Any = intrinsic(_single)
"""The value of one code. Args: address of scale and zero; code."""


@njit(inline="always")
def unpack_keys(address, bits, dim, columns):  # type: ignore[no-untyped-def]
    """Decode K of a head and a page.

    Args:
        address: Where it begins.
        bits: Bits of a code: 2, 4 or 8.
        dim: Number of channels.
        columns: fp32 ``[dim * 32]``, filled: channel after channel.
    """
    codes = address + FACTOR_BYTES * dim
    if bits == 2:
        for d in range(dim):
            _page_2(address + FACTOR_BYTES * d, codes + PAGE_TOKENS // 4 * d, columns, PAGE_TOKENS * d)
    elif bits == 4:
        for d in range(dim):
            _page_4(address + FACTOR_BYTES * d, codes + PAGE_TOKENS // 2 * d, columns, PAGE_TOKENS * d)
    else:
        for d in range(dim):
            _page_8(address + FACTOR_BYTES * d, codes + PAGE_TOKENS * d, columns, PAGE_TOKENS * d)


@njit(inline="always")
def _unpack_part(factors, codes, bits, n, values, first):  # type: ignore[no-untyped-def]
    """Decode n numbers of a group, which begin at a whole byte."""
    done = 0
    while n - done >= LANES:
        at = codes + done * bits // 8
        if bits == 2:
            _some_2(factors, at, values, first + done)
        elif bits == 4:
            _some_4(factors, at, values, first + done)
        else:
            _some_8(factors, at, values, first + done)
        done += LANES
    stored = array_at(codes, (n * bits + 7) // 8, np.uint8)
    for i in range(done, n):
        code = (np.int64(stored[i * bits // 8]) >> (i * bits % 8)) & ((1 << bits) - 1)
        values[first + i] = _number(factors, code)


@njit(inline="always")
def unpack_token(address, bits, dim, values, first):  # type: ignore[no-untyped-def]
    """Decode a token of V of a head.

    Args:
        address: Where its row begins.
        bits: Bits of a code: 2, 4 or 8.
        dim: Numbers of a token.
        values: fp32, flat.
        first: Where its numbers go.
    """
    groups = (dim + GROUP - 1) // GROUP
    for g in range(groups):
        factors = address + FACTOR_BYTES * g
        codes = address + FACTOR_BYTES * groups + GROUP // 8 * bits * g
        n, at = min(GROUP, dim - GROUP * g), first + GROUP * g
        if n < GROUP:
            _unpack_part(factors, codes, bits, n, values, at)
        elif bits == 2:
            _group_2(factors, codes, values, at)
        elif bits == 4:
            _group_4(factors, codes, values, at)
        else:
            _group_8(factors, codes, values, at)


@njit(inline="always")
def unpack_values(address, bits, dim, values):  # type: ignore[no-untyped-def]
    """Decode V of a head and a page.

    Args:
        address: Where it begins.
        bits: Bits of a code: 2, 4 or 8.
        dim: Numbers of a token.
        values: fp32 ``[32 * dim]``, filled: token after token.
    """
    row_bytes = (FACTOR_BYTES * ((dim + GROUP - 1) // GROUP) + (dim * bits + 7) // 8 + 1) // 2 * 2
    for t in range(PAGE_TOKENS):
        unpack_token(address + row_bytes * t, bits, dim, values, dim * t)

"""Loops over the integers of the entropy-coded quantizer, compiled by Numba.

They work row by row, in order, so a column's sums have the same bits on every machine and with any number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen_helm.machine.compiled import compiled, size

FP32, BFLOAT16, FLOAT16 = 0, 1, 2
"""What the bits of unpacked weights mean."""
LARGEST = 127
"""Largest magnitude of an integer that is stored as int8; those beyond are exceptions."""
TOGETHER = 4
"""Rows that are unpacked together."""
SYMBOLS = 256
"""Values of an int8."""
Array = Any
"""A NumPy array; its shape is in the docstring."""
u32, f32 = np.uint32, np.float32
SIGN, MAGNITUDE = u32(0x80000000), u32(0x7FFFFFFF)
SMALLEST_NORMAL_HALF, BEYOND_HALF = u32(113 << 23), u32(143 << 23)
"""Bits of 2**-14 and 2**16 in fp32."""
HALF_ONE = u32(126 << 23)
"""Bits of 0.5, whose last place in fp32 is that of subnormal fp16 numbers."""
REBIASED = u32(((15 - 127) << 23) & 0xFFFFFFFF)
"""What brings the exponent of fp32 to that of fp16, modulo 2**32."""


@compiled
def count_columns(weight: Array, steps: Array, classes: Array, counts: Array) -> int:
    """Count the integers of a matrix by class of their column.

    Args:
        weight: fp32 ``[out, in]``.
        steps: fp32 ``[in]``.
        classes: int64 ``[in]``.
        counts: int64 ``[classes, 256]``, added to. Integer z counts at ``z + 128``, beyond int8 at its nearest end.

    Returns:
        Number of integers beyond int8.
    """
    flat, outside = counts.reshape(-1), 0
    for r in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            z = np.rint(weight[r, j] / steps[j])
            inside = min(max(z, f32(-LARGEST)), f32(LARGEST))
            outside += z != inside
            flat[classes[j] * SYMBOLS + np.int64(inside) + 128] += 1
    return outside


@compiled
def round_columns(weight: Array, steps: Array, integers: Array, products: Array, squares: Array) -> int:
    """Round the weights of a matrix to integers, and sum what a least squares fit of the steps needs.

    Args:
        weight: fp32 ``[out, in]``.
        steps: fp32 ``[in]``.
        integers: int8 ``[out, in]``, filled; those beyond int8 with its nearest end.
        products: float64 ``[in]``, added to: sums of integer times weight.
        squares: float64 ``[in]``, added to: sums of squared integers.

    Returns:
        Number of integers beyond int8.
    """
    outside = 0
    for r in range(size(weight.shape[0])):
        for j in range(size(weight.shape[1])):
            z = np.rint(weight[r, j] / steps[j])
            inside = min(max(z, f32(-LARGEST)), f32(LARGEST))
            outside += z != inside
            integers[r, j] = np.int8(inside)
            products[j] += np.float64(z) * np.float64(weight[r, j])
            squares[j] += np.float64(z) * np.float64(z)
    return outside


@njit(inline="always")
def _to_bfloat16(bits: Any) -> Any:
    """Round the bits of a finite fp32 number to bf16, to the nearest, halfway to the even one."""
    return np.uint16((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16))


@njit(inline="always")
def _round_to_halves(numbers: Array, bits: Array, sums: Array, halves: Array) -> None:
    """Round finite fp32 numbers to fp16, to the nearest, halfway to the even one; those too large become infinite.

    Source of the three cases: F. Giesen, float_to_half_fast3_rtne.

    Args:
        numbers: fp32 ``[n]``.
        bits: The same memory as uint32.
        sums: fp32 ``[n]``, overwritten.
        halves: uint16 ``[n]``, filled.
    """
    sum_bits = sums.view(np.uint32)
    for j in range(size(len(halves))):
        # These sums have the places of subnormal fp16 numbers, so up to 2**-14 the addition rounds.
        sums[j] = abs(numbers[j]) + f32(0.5)
    for j in range(size(len(halves))):
        x = bits[j] & MAGNITUDE
        normal = u32(x + REBIASED + u32(0xFFF) + ((x >> u32(13)) & u32(1))) >> u32(13)
        found = normal if x < BEYOND_HALF else u32(0x7C00)
        found = found if x > SMALLEST_NORMAL_HALF else u32(sum_bits[j] - HALF_ONE)
        halves[j] = np.uint16(((bits[j] & SIGN) >> u32(16)) | found)


@njit(inline="always")
def _gather(unsigned, widths, order, rows, top, gathered, packed):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Bring four rows into the matrix's order of columns, as bytes of one word: a word is moved as fast as a byte.

    Args:
        unsigned: uint8 ``[rows * in]``: integers as `unpack_columns` takes them.
        widths: Likewise.
        order: Likewise.
        rows: How many there are.
        top: The first of the four. Those beyond the last are copies of it.
        gathered: uint32 ``[in]``, overwritten.
        packed: uint32 ``[in]``, filled: the first row in the lowest byte.
    """
    first, last = size(0), rows - size(1)
    for g in range(size(len(widths))):
        width, begin = size(widths[g]), first * rows
        a = begin + top * width
        b = begin + min(top + size(1), last) * width
        c = begin + min(top + size(2), last) * width
        d = begin + min(top + size(3), last) * width
        for i in range(width):
            low = u32(unsigned[a + i]) | (u32(unsigned[b + i]) << u32(8))
            gathered[i] = u32(low | (u32(unsigned[c + i]) << u32(16)) | (u32(unsigned[d + i]) << u32(24)))
        for i in range(width):
            packed[size(order[first + i])] = gathered[i]
        first += width


@njit(inline="always")
def _multiply(packed: Array, row: Any, steps: Array, factor: Any, numbers: Array) -> None:
    """Multiply one of four rows by the steps, then by its factor."""
    left = (u32(TOGETHER - 1) - row) * u32(8)
    for j in range(size(len(steps))):
        numbers[j] = f32(np.int32(u32(packed[j] << left)) >> np.int32(24)) * steps[j] * factor


@compiled
def order_columns(integers: Array, widths: Array, order: Array, ordered: Array) -> None:
    """Bring rows of a matrix into its order of columns.

    Args:
        integers: int8 ``[rows * in]``: as `unpack_columns` takes them.
        widths: Likewise.
        order: Likewise.
        ordered: int8 ``[rows * in]``, filled: the rows one behind the other.
    """
    columns = size(len(order))
    rows = size(len(integers)) // columns
    unsigned, target = integers.view(np.uint8), ordered.view(np.uint8)
    gathered, packed = np.empty(columns, np.uint32), np.empty(columns, np.uint32)
    for top in range(size(0), rows, size(TOGETHER)):
        _gather(unsigned, widths, order, rows, top, gathered, packed)
        for r in range(top, min(top + size(TOGETHER), rows)):
            shift, row = u32(u32(r - top) * u32(8)), target[r * columns : (r + size(1)) * columns]
            for j in range(columns):
                row[j] = np.uint8((packed[j] >> shift) & u32(0xFF))


@compiled
def unpack_columns(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - Numba infers types, and knows no dataclasses
    integers, widths, order, steps, factors, places, values, kind, words, halves
):
    """Bring rows of a matrix from stored integers to weights: fp32 products of integer and step, times the row's factor.

    Args:
        integers: int8 ``[rows * in]``: groups of columns, one behind the other, each ``[rows, width]``.
        widths: int64 ``[groups]``: columns of each group.
        order: int32 ``[in]``: which column of the matrix each stored column is.
        steps: fp32 ``[in]``, in the matrix's order.
        factors: fp32 ``[rows]``; empty: all are 1.
        places: int64 ``[n]``: flat indices within these rows of integers beyond int8.
        values: int32 ``[n]``: those integers.
        kind: What is written: `FP32`, `BFLOAT16` or `FLOAT16`.
        words: uint32 ``[rows * in]``, filled if fp32 is written; otherwise any length.
        halves: uint16 ``[rows * in]``, filled if 16 bits are written; otherwise any length.
    """
    columns = size(len(steps))
    rows = size(len(integers)) // columns
    unsigned = integers.view(np.uint8)
    gathered, packed = np.empty(columns, np.uint32), np.empty(columns, np.uint32)
    numbers, sums = np.empty(columns, np.float32), np.empty(columns, np.float32)
    bits = numbers.view(np.uint32)
    exception, num_exceptions, has_factors = size(0), size(len(places)), len(factors) > 0
    for top in range(size(0), rows, size(TOGETHER)):
        _gather(unsigned, widths, order, rows, top, gathered, packed)
        for r in range(top, min(top + size(TOGETHER), rows)):
            factor = factors[r] if has_factors else f32(1)
            _multiply(packed, u32(r - top), steps, factor, numbers)
            stored = r * columns
            while exception < num_exceptions and size(places[exception]) < stored + columns:
                column = size(places[exception]) - stored
                numbers[column] = f32(values[exception]) * steps[column] * factor
                exception += size(1)
            if kind == FP32:
                target = words[stored : stored + columns]
                for j in range(columns):
                    target[j] = bits[j]
            else:
                half = halves[stored : stored + columns]
                if kind == BFLOAT16:
                    for j in range(columns):
                        half[j] = _to_bfloat16(bits[j])
                else:
                    _round_to_halves(numbers, bits, sums, half)

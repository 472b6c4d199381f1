"""Stored weights into a matrix of float32, bfloat16 or float16 on the CPU, in one pass compiled by Numba, without the GIL.

A row of the weight is unpacked at a time: codes by one shift of neighbouring bytes, times the scales of its block of 64 rows,
which lie side by side. Columns sorted by width are put into their places by a gather from this row, which is in the L1 cache.
Arithmetic is that of `dequantize` in float32, operation by operation, rounded once to the target's dtype (to nearest, ties to
even); so results are equal by bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from flexgen_helm.compression.columns import Columns
from flexgen_helm.compression.minmax import MinMaxCodes
from flexgen_helm.machine.compiled import compiled, size
from flexgen_helm.machine.floats import KINDS, from_half, store_numbers

BLOCK = 64
"""Rows of a block."""
SUPER = 16
"""Groups of a super scale."""
f32 = np.float32
Array = Any
"""A NumPy array; its shape is in the docstring."""


def unpack_columns(stored: Columns, target: Tensor) -> None:
    """Write a stored matrix.

    Args:
        stored: See `flexgen_helm.compression.columns`.
        target: ``[out, in]`` in float32, bfloat16 or float16 on the CPU; numbers of a row are neighbours.
    """
    assert target.shape == stored.shape
    words, stride = _words(target)
    super_scales = stored.super_scales.view(torch.int16).numpy().view(np.uint16)
    arrays = (stored.classes.numpy(), stored.codes.numpy(), super_scales, stored.scales.numpy())
    widths = np.array(stored.ladder, np.uint64)
    _unpack_columns(*arrays, f32(stored.unit), widths, words, stride, *stored.shape, KINDS[target.dtype])


def unpack_minmax(stored: MinMaxCodes, target: Tensor) -> None:
    """Write a stored matrix.

    Args:
        stored: See `flexgen_helm.compression.minmax`.
        target: ``[out, in]`` in float32, bfloat16 or float16 on the CPU; numbers of a row are neighbours.
    """
    assert target.shape == (stored.num_rows, stored.codes.shape[1])
    words, stride = _words(target)
    scale, minimum = (x.view(torch.int16).numpy().view(np.uint16) for x in (stored.scale, stored.minimum))
    codes = stored.codes.numpy().reshape(-1)
    _unpack_minmax(codes, scale, minimum, stored.bits, stored.group, words, stride, *target.shape, KINDS[target.dtype])


def _words(target: Tensor) -> tuple[Array, int]:
    """Return the memory from the target's first number to its last, as unsigned integers, and the numbers from row to row."""
    num_rows, num_columns = target.shape
    stride = target.stride(0)
    assert target.stride(1) == 1 or num_columns == 1
    flat = target.as_strided(((num_rows - 1) * stride + num_columns,), (1,))
    if target.dtype == torch.float32:
        return flat.view(torch.int32).numpy().view(np.uint32), stride
    return flat.view(torch.int16).numpy().view(np.uint16), stride


@njit(inline="always")
def _low_plane(bits):  # type: ignore[no-untyped-def]
    """Bits of the lower plane of a code; the rest is the upper one."""
    if bits == size(8):
        return size(8)
    return size(4) if bits >= size(4) else size(2)


@njit(nogil=True)
def _unpack_vector(packed: Array, bits: int, codes: Array) -> None:
    """Unpack codes that are packed as a matrix of one column.

    Args:
        packed: uint8 ``[filled * bits / 8]``.
        bits: Bits of a code.
        codes: uint8 ``[filled]``, filled.
    """
    at, low = size(0), _low_plane(size(bits))
    codes[:] = 0
    for first in range(size(0), size(len(codes)), size(BLOCK)):
        n = min(size(BLOCK), size(len(codes)) - first)
        shift, plane = size(0), low
        while shift < size(bits):
            step, mask = n * plane // size(8), np.uint8((size(1) << plane) - size(1))
            for k in range(size(8) // plane):
                for t in range(step):
                    codes[first + k * step + t] |= ((packed[at + t] >> np.uint8(k * plane)) & mask) << np.uint8(shift)
            at += step
            shift, plane = shift + plane, size(bits) - plane


@njit(inline="always", error_model="numpy")
def _number(code, scale, minimum, divide):  # type: ignore[no-untyped-def]
    return f32(code) / scale + minimum if divide else f32(code) * scale - minimum


@njit(error_model="numpy")
def _unpack_row(codes, at, bits, height, row, scale, minimum, scales_at, divide, out, out_at, n):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Unpack the codes of one width in a row of a block.

    Places are numbers and arrays are whole, because Numba counts references to every slice.

    Args:
        codes: uint8, flat.
        at: Where the block begins.
        bits: Bits of a code.
        height: Rows of the block.
        row: Which.
        scale: float32, flat.
        minimum: float32, flat: added where codes are divided, else subtracted.
        scales_at: Where the numbers of these columns begin in both.
        divide: Whether codes are divided by scales, or multiplied.
        out: float32, flat.
        out_at: Where to write.
        n: How many columns.
    """
    low = _low_plane(bits)
    step = height * low // size(8)
    first = at + row % step * n
    shift, mask = np.int32(row // step * low), np.int32((size(1) << low) - size(1))
    if low == bits:
        for i in range(n):
            code = (np.int32(codes[first + i]) >> shift) & mask
            out[out_at + i] = _number(code, scale[scales_at + i], minimum[scales_at + i], divide)
        return
    at += step * n
    high = bits - low
    step = height * high // size(8)
    second = at + row % step * n
    upper_shift, upper_mask, up = np.int32(row // step * high), np.int32((size(1) << high) - size(1)), np.int32(low)
    for i in range(n):
        upper = ((np.int32(codes[second + i]) >> upper_shift) & upper_mask) << up
        code = ((np.int32(codes[first + i]) >> shift) & mask) | upper
        out[out_at + i] = _number(code, scale[scales_at + i], minimum[scales_at + i], divide)


@njit(nogil=True)
def _sort_columns(classes: Array, places: Array, counts: Array) -> None:
    """Find the place of each column among columns sorted by class, stably.

    Args:
        classes: uint8, ``[in]`` and more.
        places: int32 ``[in]``, filled.
        counts: uint64 ``[widths]``, filled: columns of each class.
    """
    counts[:] = 0
    for i in range(size(len(places))):
        counts[classes[i]] += size(1)
    begins = np.zeros(len(counts), np.uint64)
    for k in range(1, len(counts)):
        begins[k] = begins[k - 1] + counts[k - 1]
    for i in range(size(len(places))):
        places[i] = begins[classes[i]]
        begins[classes[i]] += size(1)


@njit(nogil=True)
def _spread(supers, unit, packed, blocks, out):  # type: ignore[no-untyped-def]
    """Compute numbers of groups from their two levels.

    Args:
        supers: uint16 ``[ceil(G / 16)]``: bits of float16.
        unit: Factor.
        packed: uint8: 6-bit shares of G groups, those of a column together.
        blocks: Groups of a column.
        out: float32 ``[blocks * in]``, filled: those of a block of rows together.
    """
    groups = size(len(out))
    shares = np.empty((len(out) + 7) // 8 * 8, np.uint8)
    _unpack_vector(packed, 6, shares)
    num_columns = groups // blocks
    # Some columns at a time, so that neighbours are written together.
    for first in range(size(0), num_columns, size(SUPER)):
        end = min(first + size(SUPER), num_columns)
        for block in range(blocks):
            for column in range(first, end):
                g = column * blocks + block
                out[block * num_columns + column] = (from_half(supers[g // size(SUPER)]) * unit) * f32(shares[g])


@compiled
def _unpack_columns(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - Numba infers types, and knows no dataclasses
    packed_classes, codes, super_scales, shares, unit, widths, target, stride, num_rows, num_columns, kind
):
    """Write a matrix; see `unpack_columns`. Tensors are NumPy arrays, float16 is uint16, the target is flat."""
    rows, columns, step = size(num_rows), size(num_columns), size(stride)
    blocks = (rows + size(BLOCK - 1)) // size(BLOCK)
    classes = np.empty(len(packed_classes) * 4, np.uint8)
    _unpack_vector(packed_classes, 2, classes)
    places, counts = np.empty(columns, np.uint32), np.empty(len(widths), np.uint64)
    _sort_columns(classes, places, counts)
    scale, minimum = np.empty(blocks * columns, np.float32), np.empty(blocks * columns, np.float32)
    _spread(super_scales[0], unit, shares[0], blocks, scale)
    _spread(super_scales[1], unit, shares[1], blocks, minimum)
    row, rounded = np.empty(columns, np.float32), np.empty(columns, target.dtype)
    filled = (rows + size(7)) // size(8) * size(8)
    for block in range(blocks):
        height, own = min(size(BLOCK), filled - block * size(BLOCK)), block * columns
        for r in range(min(size(BLOCK), rows - block * size(BLOCK))):
            at, first = size(0), size(0)
            for k in range(size(len(widths))):
                end = first + counts[k]
                begin = at + block * size(8) * widths[k] * counts[k]
                _unpack_row(codes, begin, widths[k], height, r, scale, minimum, own + first, False, row, first, counts[k])
                at, first = at + filled * widths[k] // size(8) * counts[k], end
            begin = (block * size(BLOCK) + r) * step
            store_numbers(row, rounded, kind)
            for i in range(columns):
                target[begin + i] = rounded[places[i]]


@compiled
def _unpack_minmax(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - as above
    codes, scale, minimum, bits, group, target, stride, num_rows, num_columns, kind
):
    """Write a matrix; see `unpack_minmax`. Tensors are NumPy arrays, float16 is uint16, codes and target are flat."""
    rows, columns, step = size(num_rows), size(num_columns), size(stride)
    s, m = np.empty(columns, np.float32), np.empty(columns, np.float32)
    row = np.empty(columns, np.float32)
    filled, width = (rows + size(7)) // size(8) * size(8), size(bits)
    for r in range(rows):
        if r % size(group) == size(0):
            for i in range(columns):
                s[i], m[i] = from_half(scale[r // size(group), i]), from_half(minimum[r // size(group), i])
        block = r // size(BLOCK)
        height = min(size(BLOCK), filled - block * size(BLOCK))
        begin, zero = block * size(8) * width * columns, size(0)
        _unpack_row(codes, begin, width, height, r % size(BLOCK), s, m, zero, True, row, zero, columns)
        store_numbers(row, target[r * step : r * step + columns], kind)

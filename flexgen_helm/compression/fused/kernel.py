"""The kernels: a program computes 64 rows, which are packed together, of a tile of columns.

Arithmetic is that of `columns.dequantize` and `minmax.dequantize` in fp32, operation by operation, rounded once; so results are
equal by bit, if the compiler fuses no product with a sum.
"""

# Triton's language has no types.
# mypy: ignore-errors
# ruff: noqa: PLR0913

from __future__ import annotations

import triton
import triton.language as tl

from flexgen_helm.compression import packing
from flexgen_helm.compression.allocation import SCALE_BITS, SUPER_GROUPS

ROWS, FILLED = tl.constexpr(packing.BLOCK_ROWS), tl.constexpr(packing.FILLED_ROWS)
COLUMNS, ONE = tl.constexpr(64), tl.constexpr(1)
SUPER, SHARE_BITS = tl.constexpr(SUPER_GROUPS), tl.constexpr(SCALE_BITS)


@triton.jit
def _height(num_rows, block):
    """Rows that are stored of a block: 64, or what is left, filled up."""
    return tl.minimum((num_rows + FILLED - 1) // FILLED * FILLED - block * ROWS, ROWS)


@triton.jit
def _field(first, height, row, stride, mask, BITS: tl.constexpr):
    """The part of codes that is in one plane, whose bytes begin at ``first``."""
    step = height * BITS // 8
    byte = tl.load(first + (row % step).to(tl.int64) * stride, mask=mask, other=0).to(tl.int32)
    return (byte >> (row // step * BITS)) & ((ONE << BITS) - 1)


@triton.jit
def _codes(first, height, row, stride, mask, BITS: tl.constexpr):
    """Codes of rows of a block whose bytes begin at ``first``; see `flexgen_helm.compression.packing`."""
    LOW: tl.constexpr = BITS if BITS == 2 or BITS == 4 or BITS == 8 else (4 if BITS > 4 else 2)
    codes = _field(first, height, row, stride, mask, LOW)
    if LOW < BITS:
        plane = (height * LOW // 8).to(tl.int64) * stride
        codes |= _field(first + plane, height, row, stride, mask, BITS - LOW) << LOW
    return codes


@triton.jit
def _numbers(supers, shares, group, num_groups, unit, mask):
    """Scales or minima of groups: shares of 6 bits, packed as a matrix of one column, of the super scales in units."""
    block = group // ROWS
    share = _codes(shares + block * (ROWS * SHARE_BITS // 8), _height(num_groups, block), group % ROWS, 1, mask, SHARE_BITS)
    return tl.load(supers + group // SUPER, mask=mask, other=0).to(tl.float32) * unit * share.to(tl.float32)


@triton.jit(do_not_specialize=["codes_at", "first_column", "num_columns"])
def unpack_columns(
    codes, order, super_scales, scales, unit, target, codes_at, first_column, num_columns, num_rows, all_columns, stride,
    BITS: tl.constexpr,
):  # fmt: skip
    """Unpack the columns of one width.

    Args:
        codes: Of all widths.
        order: int64 ``[all_columns]``: the columns, sorted by width.
        super_scales: float16 ``[2, ceil(groups / 16)]``.
        scales: uint8 ``[2, packed_rows(groups, 6)]``.
        unit: fp32 ``[1]``.
        target: ``[num_rows, all_columns]``, with neighbours in a row.
        codes_at: Where the codes of this width begin.
        first_column: Place of the first of these columns in ``order``.
        num_columns: Columns of this width.
        num_rows: Rows of the matrix.
        all_columns: Columns of the matrix.
        stride: Numbers from row to row of the target.
        BITS: The width.
    """
    block, blocks = tl.program_id(0), (num_rows + ROWS - 1) // ROWS
    column, row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    is_column, is_row = column < num_columns, block * ROWS + row < num_rows
    groups = all_columns * blocks
    group = (first_column + column) * blocks + block
    of_unit = tl.load(unit)
    supers, shares = (groups + SUPER - 1) // SUPER, (groups + FILLED - 1) // FILLED * SHARE_BITS
    scale = _numbers(super_scales, scales, group, groups, of_unit, is_column)
    minimum = _numbers(super_scales + supers, scales + shares, group, groups, of_unit, is_column)
    mask = is_row[:, None] & is_column[None, :]
    first = codes + codes_at + (block * (ROWS * BITS // 8)).to(tl.int64) * num_columns + column[None, :]
    found = _codes(first, _height(num_rows, block), row[:, None], num_columns, mask, BITS)
    number = found.to(tl.float32) * scale[None, :] - minimum[None, :]
    place = tl.load(order + first_column + column, mask=is_column, other=0)
    at = target + (block * ROWS + row).to(tl.int64)[:, None] * stride + place[None, :]
    tl.store(at, number.to(target.dtype.element_ty), mask=mask)


@triton.jit
def unpack_minmax(codes, scales, minima, target, num_rows, num_columns, stride, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Unpack a matrix of `flexgen_helm.compression.minmax`; scales and minima are float16 ``[groups, num_columns]``."""
    block = tl.program_id(0)
    column, row = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    mask = (block * ROWS + row < num_rows)[:, None] & (column < num_columns)[None, :]
    first = codes + (block * (ROWS * BITS // 8)).to(tl.int64) * num_columns + column[None, :]
    found = _codes(first, _height(num_rows, block), row[:, None], num_columns, mask, BITS)
    group = ((block * ROWS + row) // GROUP).to(tl.int64)[:, None] * num_columns + column[None, :]
    scale = tl.load(scales + group, mask=mask, other=1).to(tl.float32)
    minimum = tl.load(minima + group, mask=mask, other=0).to(tl.float32)
    number = tl.math.div_rn(found.to(tl.float32), scale) + minimum
    at = target + (block * ROWS + row).to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, number.to(target.dtype.element_ty), mask=mask)

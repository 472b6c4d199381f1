"""Scale and minimum of groups by least squares, compiled by Numba: ``x ~ code * scale + minimum`` with a minimum of at most 0.

A block of 64 rows of 64 columns, one group a column, is copied into scratch memory that stays in the L1 cache. Everything is
computed there for 64 groups side by side, so that loops are vectorised and sums do not depend on how wide vectors are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexgen_helm.machine.compiled import compiled, size

f32 = np.float32
ROWS = LANES = 64
"""Rows of a group, and groups side by side."""
CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that the codes span at first."""
ROUNDS = 2
"""Rounds of least squares and rounding for each candidate."""
# Rows of the scratch memory behind the block, of `LANES` numbers each.
LEVELS, LOW, HIGH, TOTAL, SCALE, MINIMUM, INVERSE = (ROWS + i for i in range(7))
ERROR, CODES, CODES_X, CODES_CODES = (ROWS + i for i in range(7, 11))
BEST_ERROR, BEST_SCALE, BEST_MINIMUM = (ROWS + i for i in range(11, 14))
SCRATCH = ROWS + 14
ZERO, ONE, HALF = f32(0), f32(1), f32(0.5)
Array = Any
"""A NumPy array; its shape is in the docstring."""


@compiled
def fit_groups(weight: Array, unit: Any, levels: Array, scale: Array, minimum: Array) -> None:
    """Find the scale and minimum with the least squared error among those tried.

    Args:
        weight: fp32 ``[R, C]``, finite.
        unit: fp32: what the weights are multiplied by first.
        levels: fp32 ``[C]``: the largest code of each column.
        scale: fp32 ``[ceil(R / 64), C]``, filled: at least 0; 0 for a group of one number that is not positive.
        minimum: Filled alike: at most 0.
    """
    scratch = np.empty(SCRATCH * LANES, f32)
    for b in range(scale.shape[0]):
        for c in range(0, weight.shape[1], LANES):
            n = _load(weight, unit, levels, b, c, scratch)
            _ranges(n, scratch)
            for share in CANDIDATES:
                _start(f32(share), scratch)
                for i in range(ROUNDS + 1):
                    _round(n, scratch)
                    _keep_best(scratch)
                    if i < ROUNDS:
                        _least_squares(n, scratch)
            _store(scratch, BEST_SCALE, scale[b], c)
            _store(scratch, BEST_MINIMUM, minimum[b], c)


@compiled
def residuals(  # noqa: PLR0913 - Numba knows no dataclasses
    weight: Array, unit: Any, levels: Array, scale: Array, minimum: Array, means: Array, errors: Array
) -> None:
    """Find what is left of groups when they are rounded.

    Args:
        weight: fp32 ``[R, C]``.
        unit: fp32: what the weights are multiplied by first.
        levels: fp32 ``[C]``: the largest code of each column.
        scale: fp32 ``[ceil(R / 64), C]``.
        minimum: Alike.
        means: Filled alike: mean of weight less code times scale, which is the best minimum for the codes.
        errors: Filled alike: sum of squared errors.
    """
    scratch = np.empty(SCRATCH * LANES, f32)
    for b in range(scale.shape[0]):
        for c in range(0, weight.shape[1], LANES):
            n = _load(weight, unit, levels, b, c, scratch)
            _ranges(n, scratch)
            _take(scale[b], minimum[b], c, scratch)
            _round(n, scratch)
            for i in range(size(LANES)):
                rest = scratch[TOTAL * LANES + i] - scratch[CODES * LANES + i] * scratch[SCALE * LANES + i]
                scratch[CODES * LANES + i] = rest / f32(n)
            _store(scratch, CODES, means[b], c)
            _store(scratch, ERROR, errors[b], c)


@compiled
def round_groups(weight: Array, unit: Any, levels: Array, scale: Array, minimum: Array, codes: Array) -> None:
    """Find the nearest codes.

    Args:
        weight: fp32 ``[R, C]``.
        unit: fp32: what the weights are multiplied by first.
        levels: fp32 ``[C]``: the largest code of each column.
        scale: fp32 ``[ceil(R / 64), C]``.
        minimum: Alike.
        codes: uint8 ``[R, C]``, filled; 0 where the scale is 0.
    """
    scratch = np.empty(SCRATCH * LANES, f32)
    for b in range(scale.shape[0]):
        for c in range(0, weight.shape[1], LANES):
            n = _load(weight, unit, levels, b, c, scratch)
            _take(scale[b], minimum[b], c, scratch)
            for r in range(n):
                row = codes[b * ROWS + r, c : c + LANES]
                for i in range(size(len(row))):
                    row[i] = np.uint8(_code(scratch, r, i))


@compiled
def _load(weight: Array, unit: Any, levels: Array, b: Any, c: Any, scratch: Array) -> Any:
    """Copy a block, with zeros where there are no columns; returns its rows."""
    n = min(ROWS, weight.shape[0] - b * ROWS)
    scratch[:] = ZERO
    for r in range(n):
        row = weight[b * ROWS + r, c : c + LANES]
        for i in range(size(len(row))):
            scratch[r * LANES + i] = row[i] * unit
    found = levels[c : c + LANES]
    scratch[LEVELS * LANES : (LEVELS + 1) * LANES] = ONE
    for i in range(size(len(found))):
        scratch[LEVELS * LANES + i] = found[i]
    return n


@compiled
def _store(scratch: Array, row: Any, target: Array, c: Any) -> None:
    found = target[c : c + LANES]
    for i in range(size(len(found))):
        found[i] = scratch[row * LANES + i]


@compiled
def _take(scale: Array, minimum: Array, c: Any, scratch: Array) -> None:
    own, low = scale[c : c + LANES], minimum[c : c + LANES]
    for i in range(size(len(own))):
        scratch[SCALE * LANES + i], scratch[MINIMUM * LANES + i] = own[i], low[i]
    _invert(scratch)


@compiled
def _ranges(n: Any, scratch: Array) -> None:
    """Find the range of each group, which reaches down to 0 at least, and its sum."""
    for i in range(size(LANES)):
        scratch[LOW * LANES + i], scratch[HIGH * LANES + i] = ZERO, scratch[i]
        scratch[TOTAL * LANES + i], scratch[BEST_ERROR * LANES + i] = ZERO, f32(np.inf)
    for r in range(size(n)):
        for i in range(size(LANES)):
            x = scratch[r * LANES + i]
            scratch[LOW * LANES + i] = min(scratch[LOW * LANES + i], x)
            scratch[HIGH * LANES + i] = max(scratch[HIGH * LANES + i], x)
            scratch[TOTAL * LANES + i] += x


@compiled
def _start(share: Any, scratch: Array) -> None:
    """Let the codes span a share of the range, about its centre."""
    for i in range(size(LANES)):
        low, high, levels = scratch[LOW * LANES + i], scratch[HIGH * LANES + i], scratch[LEVELS * LANES + i]
        scale = (high - low) / levels * share
        scratch[SCALE * LANES + i] = scale
        scratch[MINIMUM * LANES + i] = min((high + low) * HALF - scale * levels * HALF, ZERO)
    _invert(scratch)


@compiled
def _invert(scratch: Array) -> None:
    for i in range(size(LANES)):
        scale = scratch[SCALE * LANES + i]
        scratch[INVERSE * LANES + i] = ONE / scale if scale > ZERO else ZERO


@compiled
def _code(scratch: Array, r: Any, i: Any) -> Any:
    code = np.rint((scratch[r * LANES + i] - scratch[MINIMUM * LANES + i]) * scratch[INVERSE * LANES + i])
    return min(max(code, ZERO), scratch[LEVELS * LANES + i])


@compiled
def _round(n: Any, scratch: Array) -> None:
    """Round, and sum the squared errors, the codes, their products with the weights, and their squares."""
    scratch[ERROR * LANES : (CODES_CODES + 1) * LANES] = ZERO
    for r in range(size(n)):
        for i in range(size(LANES)):
            x, code = scratch[r * LANES + i], _code(scratch, r, i)
            rest = code * scratch[SCALE * LANES + i] + scratch[MINIMUM * LANES + i] - x
            scratch[ERROR * LANES + i] += rest * rest
            scratch[CODES * LANES + i] += code
            scratch[CODES_X * LANES + i] += code * x
            scratch[CODES_CODES * LANES + i] += code * code


@compiled
def _keep_best(scratch: Array) -> None:
    for i in range(size(LANES)):
        better = scratch[ERROR * LANES + i] < scratch[BEST_ERROR * LANES + i]
        scratch[BEST_ERROR * LANES + i] = scratch[(ERROR if better else BEST_ERROR) * LANES + i]
        scratch[BEST_SCALE * LANES + i] = scratch[(SCALE if better else BEST_SCALE) * LANES + i]
        scratch[BEST_MINIMUM * LANES + i] = scratch[(MINIMUM if better else BEST_MINIMUM) * LANES + i]


@compiled
def _least_squares(n: Any, scratch: Array) -> None:
    """Find the best scale and minimum for the codes; keep the former ones where the codes determine none."""
    for i in range(size(LANES)):
        x, q = scratch[TOTAL * LANES + i], scratch[CODES * LANES + i]
        qx, qq = scratch[CODES_X * LANES + i], scratch[CODES_CODES * LANES + i]
        determinant = f32(n) * qq - q * q
        if determinant > ZERO:
            scale = (f32(n) * qx - q * x) / determinant
            minimum = (x - scale * q) / f32(n)
            if minimum > ZERO:
                scale, minimum = qx / qq, ZERO
            if scale > ZERO:
                scratch[SCALE * LANES + i], scratch[MINIMUM * LANES + i] = scale, minimum
    _invert(scratch)

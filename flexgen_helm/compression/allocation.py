"""How many bits each column of each matrix gets, so that a model has exactly the bits per weight that were asked for.

The error of a column at b bits is taken as ``score * (15 / (2**b - 1))**2``. Because every further bit gains less than the one
before, taking the widenings in the order of what they gain for each bit that they cost, until the bits are spent, is the least
sum of errors for that many bits (it is what bisecting a Lagrange multiplier finds).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flexgen_helm.compression.checks import require_quantizable
from flexgen_helm.compression.minmax import LARGEST_FLOAT16, MinMax, dequantize
from flexgen_helm.compression.packing import BLOCK_ROWS, filled, packed_rows
from flexgen_helm.errors import UnsupportedModel

LADDERS = {2: (2, 3, 4, 6), 3: (3, 4, 5, 8), 4: (4, 5, 6, 8), 8: (8,)}
"""Widths of columns that a model may use, by the bits of its name: the best of some that were tried (runs/LOG.md)."""
HALF_BIT = 0.5
"""Bits per weight beyond those of the name: what FlexGen's scales and minima take in groups of 64."""
SUPER_GROUPS = 16
"""Groups that share a super scale."""
SCALE_BITS = 6
CLASS_BITS = 2
"""Bits of the map that says, for each column, which width of the ladder it has."""
UNIT_BITS = 32
"""Bits of a matrix's unit."""
NUMBERS_AT_ONCE = 2**17
"""Weights whose errors are computed together."""


def column_errors(weight: Tensor, columns: Tensor) -> Tensor:
    """Return what each column adds to the relative error of its layer's output if FlexGen's rounding to 4 bits is used.

    By `flexgen_helm.compression.sensitivity` errors ``e_ij`` of the weights cause ``sum_ij e_ij**2 * mean(g_i**2 x_j**2)``.
    Rows of a column share its width, so the mean over rows stands for each of them: with
    ``c_j = sum_i mean(g_i**2 x_j**2)`` column j causes ``c_j / out * sum_i e_ij**2``.

    Args:
        weight: ``[out, in]``, any dtype.
        columns: ``[in]``: c, `Sensitivity.columns`.

    Returns:
        float64 ``[in]``. Scores of all matrices and layers are on one scale.

    Raises:
        UnsupportedModel: If a number cannot be quantised.
    """
    require_quantizable(weight, "w4", LARGEST_FLOAT16)
    errors = torch.zeros_like(columns, dtype=torch.float64)
    # A few whole groups at a time, so that what is computed of them stays in the cache.
    for rows in weight.split(max(1, NUMBERS_AT_ONCE // (weight.shape[1] * BLOCK_ROWS)) * BLOCK_ROWS):
        exact = rows.double()
        errors += (exact - dequantize(MinMax(4).quantize(rows))).square_().sum(0)
    return columns.double() / len(weight) * errors


def overhead_bits(shape: tuple[int, int]) -> int:
    """Return the bits of a stored matrix ``[out, in]`` besides its codes."""
    groups = num_groups(shape)
    scales = 2 * 8 * packed_rows(groups, SCALE_BITS)
    super_scales = 2 * 16 * -(-groups // SUPER_GROUPS)
    return scales + super_scales + 8 * packed_rows(shape[1], CLASS_BITS) + UNIT_BITS


def num_groups(shape: tuple[int, int]) -> int:
    """Return the number of groups of a matrix ``[out, in]``: 64 rows of a column each, or the rows left."""
    return -(-shape[0] // BLOCK_ROWS) * shape[1]


@dataclass(frozen=True)
class _Widening:
    """One step of the ladder, for every column of the model."""

    gain: Tensor
    """float64 ``[columns]``: error that vanishes for each bit spent."""
    cost: Tensor
    """int64 ``[columns]``: bits spent."""


def allocate(
    scores: Sequence[Tensor], shapes: Sequence[tuple[int, int]], bits: int, ladder: Sequence[int] | None = None
) -> list[Tensor]:
    """Choose the width of every column of a model.

    Args:
        scores: For each matrix ``[in]``, see `column_errors`.
        shapes: ``(out, in)`` of each matrix.
        bits: N: all matrices together get N + 0.5 bits per weight, scales and maps included, less at most one widening of one
            column. Fewer where every column has the largest width (w8).
        ladder: Widths to choose from, ascending; those of `LADDERS` by default.

    Returns:
        For each matrix uint8 ``[in]``.

    Raises:
        UnsupportedModel: If the matrices have so few rows that scales alone take more.
    """
    ladder = LADDERS[bits] if ladder is None else ladder
    score = torch.cat([x.double() for x in scores])
    rows = torch.cat([torch.full((columns,), filled(num_rows)) for num_rows, columns in shapes])
    num_weights = sum(num_rows * columns for num_rows, columns in shapes)
    budget = int((bits + HALF_BIT) * num_weights) - sum(map(overhead_bits, shapes)) - ladder[0] * int(rows.sum())
    if budget < 0:
        raise UnsupportedModel(
            f"w{bits} cannot store these {len(shapes)} matrices in {bits + HALF_BIT} bits per weight: with {ladder[0]} bits a "
            f"code they take {bits + HALF_BIT - budget / num_weights:.2f}, because columns of so few rows "
            f"(the shortest has {min(num_rows for num_rows, _ in shapes)}) need many scales. Use w{bits}-minmax or w8-minmax."
        )
    steps = [_widening(score, rows, before, after) for before, after in pairwise(ladder)]
    widths = torch.full_like(rows, ladder[0], dtype=torch.uint8)
    if steps:
        gains, costs = torch.stack([step.gain for step in steps]).view(-1), torch.stack([step.cost for step in steps]).view(-1)
        # Equal gains keep their order, so that a column never skips a step.
        order = gains.sort(descending=True, stable=True).indices
        taken = torch.zeros_like(gains, dtype=torch.bool)
        taken[order] = costs[order].cumsum(0) <= budget
        widths = torch.tensor(ladder, dtype=torch.uint8)[taken.view(len(steps), -1).sum(0)]
    return list(widths.split([columns for _, columns in shapes]))


def _widening(score: Tensor, rows: Tensor, before: int, after: int) -> _Widening:
    saved = (15 / (2**before - 1)) ** 2 - (15 / (2**after - 1)) ** 2
    cost = rows * (after - before)
    return _Widening(score * saved / cost, cost)

"""Weights in a fixed layout in which columns that matter more have more bits: FlexGen's bits per weight, a quarter of its loss.

Columns are sorted by their width, stably. Each is cut into groups of 64 rows (the last one may have fewer) with a scale and a
minimum of at most 0, found by least squares. Over 16 groups, in the order of sorted columns and down each, the largest scale
and minimum are stored in float16, and each group's own as 6-bit shares of them; llama.cpp's Q4_K has the same two levels. So
``x = code * (d * s) - dm * m``. Measured against other recipes in ``python -m flexgen_helm.runs.quantizers``.

Codes of equally wide columns are packed as one matrix ``[out, columns]`` (`flexgen_helm.compression.packing`): a row of them is
a row of the weight, so that unpacking runs along rows. The matrices of all widths follow each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.compression.allocation import CLASS_BITS, SCALE_BITS, SUPER_GROUPS, UNIT_BITS, num_groups
from flexgen_helm.compression.checks import require_quantizable
from flexgen_helm.compression.group_kernel import fit_groups, residuals, round_groups
from flexgen_helm.compression.packing import BLOCK_ROWS, pack, packed_rows, unpack

MOST_SHARE = 2**SCALE_BITS - 1
LEAST_FLOAT16 = 2.0**-24
SHARE_STEPS = (0, -1, 1, 2)
"""Neighbours of a rounded scale that are tried."""
UNIT_EXPONENT = 18
"""The largest weight has about 2 to this power units: super scales of it and of a billionth of it are float16 numbers."""


@dataclass(frozen=True)
class Columns:
    """A stored matrix ``[out, in]`` of G groups."""

    shape: tuple[int, int]
    ladder: tuple[int, ...]
    """Widths that columns may have, ascending, at most four."""
    counts: tuple[int, ...]
    """How many columns have each width. It follows from the classes, which a GPU would have to hand back."""
    unit: float | Tensor
    """A power of two, by which super scales are multiplied: a number, or fp32 ``[1]`` on the device of the codes."""
    classes: Tensor
    """uint8 ``[packed_rows(in, 2)]``: index in the ladder of each column."""
    codes: Tensor
    """uint8, flat: for each width ``[packed_rows(out, width), columns of this width]``."""
    super_scales: Tensor
    """float16 ``[2, ceil(G / 16)]``: largest scale and negated minimum of 16 groups, each over 63, in units."""
    scales: Tensor
    """uint8 ``[2, packed_rows(G, 6)]``: 6-bit shares of scale and negated minimum of each group."""

    @property
    def num_bits(self) -> int:
        """Bits of everything stored."""
        tensors = (self.classes, self.codes, self.super_scales, self.scales)
        return UNIT_BITS + sum(8 * x.numel() * x.element_size() for x in tensors)

    def to(self, device: torch.device) -> Columns:
        """Return a copy on a device, its unit too."""
        tensors = (x.to(device) for x in (self.classes, self.codes, self.super_scales, self.scales))
        unit = torch.as_tensor(self.unit, dtype=torch.float32, device=device).reshape(1)
        return Columns(self.shape, self.ladder, self.counts, unit, *tensors)

    @property
    def column_classes(self) -> Tensor:
        """uint8 ``[in]``: index in the ladder of each column."""
        return unpack(self.classes[:, None], CLASS_BITS, self.shape[1])[:, 0]


def quantize(weight: Tensor, column_bits: Tensor, ladder: tuple[int, ...]) -> Columns:
    """Quantise a matrix.

    Args:
        weight: ``[out, in]``, any dtype.
        column_bits: uint8 ``[in]``, see `flexgen_helm.compression.allocation.allocate`.
        ladder: Widths that occur there, ascending, at most four.

    Raises:
        UnsupportedModel: If a number is NaN or infinite.
    """
    require_quantizable(weight, f"w{ladder[0]}")
    shape = (weight.shape[0], weight.shape[1])
    classes = torch.searchsorted(torch.tensor(ladder, dtype=torch.uint8), column_bits).to(torch.uint8)
    order = classes.sort(stable=True).indices
    unit = _unit(weight)
    groups = _Groups(weight.float().contiguous(), 1 / unit, 2 ** column_bits.float() - 1, order)
    scale, minimum = groups.fit()
    d, s = _two_levels(scale, least=1)
    dm, m = _two_levels(-minimum, least=0)
    s, m = _best_shares(groups, d, s, dm, m)
    rows = groups.codes(_spread(d, s), -_spread(dm, m))[:, order]
    counts = torch.bincount(classes.int(), minlength=len(ladder)).tolist()
    packed = [pack(part, width).flatten() for part, width in zip(rows.split(counts, 1), ladder, strict=True)]
    return Columns(
        shape=shape,
        ladder=ladder,
        counts=tuple(counts),
        unit=unit,
        classes=pack(classes[:, None], CLASS_BITS)[:, 0],
        codes=torch.cat(packed),
        super_scales=torch.stack([d, dm]),
        scales=torch.stack([pack(x[:, None], SCALE_BITS)[:, 0] for x in (s, m)]),
    )


def dequantize(stored: Columns) -> Tensor:
    """Return the matrix in float32, ``[out, in]``."""
    num_rows, num_columns = stored.shape
    classes, counts = stored.column_classes, stored.counts
    heights = [packed_rows(num_rows, width) for width in stored.ladder]
    packed = stored.codes.split([height * count for height, count in zip(heights, counts, strict=True)])
    parts = [
        unpack(part.view(height, count), width, num_rows)
        for part, height, count, width in zip(packed, heights, counts, stored.ladder, strict=True)
    ]
    groups = num_groups(stored.shape)
    scale, minimum = (
        _spread(x, unpack(shares[:, None], SCALE_BITS, groups)[:, 0], stored.unit).view(num_columns, -1).T
        for x, shares in zip(stored.super_scales, stored.scales, strict=True)
    )
    block_of_row = torch.arange(num_rows, device=stored.codes.device) // BLOCK_ROWS
    weight = torch.empty(stored.shape, device=stored.codes.device)
    weight[:, classes.sort(stable=True).indices] = torch.cat(parts, 1).float() * scale[block_of_row] - minimum[block_of_row]
    return weight


def _unit(weight: Tensor) -> float:
    low, high = (float(x) for x in weight.aminmax())
    largest = max(-low, high)
    # float32 has no powers of two below 2**-126 that are exact in every product.
    return math.ldexp(1.0, max(math.frexp(largest)[1] - UNIT_EXPONENT, -126)) if largest > 0 else 1.0


@dataclass(frozen=True)
class _Groups:
    """All groups of a matrix. Their numbers are float32 ``[G]`` in the order of sorted columns, those of a column together."""

    weight: Tensor
    """float32 ``[out, in]``, contiguous."""
    per_unit: float
    """A power of two, by which weights are multiplied."""
    levels: Tensor
    """float32 ``[in]``: the largest code of each column."""
    order: Tensor
    """int64 ``[in]``: sorted columns."""

    def fit(self) -> tuple[Tensor, Tensor]:
        """Return the scale and minimum of each group."""
        return self._run(fit_groups)

    def residuals(self, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean of weight less code times scale, which is the best minimum for the codes, and sum of squared errors."""
        return self._run(residuals, scale, minimum)

    def codes(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """Return the nearest codes, uint8 ``[out, in]``."""
        codes = torch.empty(self.weight.shape, dtype=torch.uint8)
        round_groups(*self._arguments(), *map(self._blocks, (scale, minimum)), codes.numpy())
        return codes

    def _run(self, kernel: Any, *given: Tensor) -> tuple[Tensor, Tensor]:
        first, second = torch.empty(2, -(-len(self.weight) // BLOCK_ROWS), len(self.levels))
        kernel(*self._arguments(), *map(self._blocks, given), first.numpy(), second.numpy())
        return first[:, self.order].T.flatten(), second[:, self.order].T.flatten()

    def _arguments(self) -> tuple[Any, ...]:
        return self.weight.numpy(), np.float32(self.per_unit), self.levels.numpy()

    def _blocks(self, numbers: Tensor) -> Any:
        """Numbers of groups as the kernels take them: ``[blocks, in]`` in the order of the matrix."""
        blocks = torch.empty(len(numbers) // len(self.levels), len(self.levels))
        blocks[:, self.order] = numbers.view(len(self.levels), -1).T
        return blocks.numpy()


def _best_shares(groups: _Groups, d: Tensor, s: Tensor, dm: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Choose among neighbours of the rounded scale, each with a minimum that suits it, what has the least error."""
    best, best_s, best_m = torch.full(s.shape, torch.inf), s, m
    for step in SHARE_STEPS:
        own_s = (s.int() + step).clamp(1, MOST_SHARE).to(torch.uint8)
        means, _ = groups.residuals(_spread(d, own_s), -_spread(dm, m))
        own_m = _shares(-means, dm, least=0)
        _, error = groups.residuals(_spread(d, own_s), -_spread(dm, own_m))
        better = error < best
        best, best_s, best_m = (torch.where(better, *x) for x in ((error, best), (own_s, best_s), (own_m, best_m)))
    return best_s, best_m


def _two_levels(values: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Store numbers of groups as shares of the largest of 16: float16 ``[ceil(G / 16)]``, uint8 ``[G]``."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % SUPER_GROUPS)).view(-1, SUPER_GROUPS)
    supers = (blocks.amax(1) / MOST_SHARE).clamp(min=LEAST_FLOAT16).half()
    return supers, _shares(values, supers, least)


def _shares(values: Tensor, supers: Tensor, least: int) -> Tensor:
    whole = supers.float().repeat_interleave(SUPER_GROUPS)[: len(values)]
    return (values / whole).round().clamp(least, MOST_SHARE).to(torch.uint8)


def _spread(supers: Tensor, shares: Tensor, unit: float | Tensor = 1.0) -> Tensor:
    """Return the numbers of groups: float32 ``[G]``."""
    return (supers.float() * unit).repeat_interleave(SUPER_GROUPS)[: len(shares)] * shares

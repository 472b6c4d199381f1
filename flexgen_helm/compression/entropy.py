"""The entropy-coded quantizer: every column has one step, weights are rounded to integers, and integers are entropy-coded.

``w_ij ~ z_ij * s_j`` with ``z_ij = round(w_ij / step_j)``. Columns of whose weights errors matter more have finer steps:
``step_j = factor * max(c_j / mean c, 1/4)**-0.45 * (a / median a)**-0.45``, where c is their sensitivity (see
`flexgen_helm.compression.sensitivity`) and ``a = mean c / out`` of the matrix. One factor for the whole model is solved so that
all bits are as many as asked. ``s_j`` is the step that fits the integers best (least squares), in fp16.

Steps that follow the square root of c, as theory has it for one layer (water-filling: WaterSIC, arXiv 2603.04956), lose more:
the exponents are damped because errors of several layers add up.

Shapes: out rows, in columns of a linear layer's weight ``[out, in]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median_low

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.compression.entropy_kernel import LARGEST, SYMBOLS, count_columns, round_columns
from flexgen_helm.errors import PolicyError, UnsupportedModel

EXPONENT = 0.45
FLOOR = 0.25
"""Columns that matter less than this share of the mean get no coarser steps."""
CLASSES = 64
"""Classes of columns by their spread in steps. Columns of a class share a code."""
CLASSES_PER_OCTAVE, SMALLEST_OCTAVE = 4, -4
COLUMN_BITS = 16 + 6
"""Bits of a column: its step in fp16, and its class."""
ROW_BITS = 8
"""Bits of a row that has a factor of its own."""
CODE_OVERHEAD = 1.015
"""Bits of real frames over the entropy: Huffman codes in whole bits, their tables, headers. Wider matrices take less."""
EXCEPTION_BITS = 64 + 32
"""Bits of an integer beyond int8: its place and itself."""
SMALLEST_STEP, LARGEST_STEP = 2.0**-20, 65504.0
"""Steps outside have no or few digits in fp16."""
NUMBERS_AT_ONCE = 2**22
"""Weights that are in memory in fp32 at a time while a matrix is multiplied by factors of its rows."""
LARGEST_INTEGER = 2**24
"""Integers up to here are exact in fp32."""
TOLERANCE = 1e-4
"""Bits a weight by which a model may be smaller than asked."""
MOST_PASSES = 40
GAUSSIAN_BITS = 0.5 * math.log2(2 * math.pi * math.e)
"""Entropy of a Gaussian number in units of its standard deviation."""


@dataclass(frozen=True)
class StepRule:
    """What decides the steps of all columns of a model besides their own weights and sensitivities."""

    factor: float
    typical: float
    """The median over all matrices of ``a``, see the module."""


@dataclass(frozen=True)
class Coded:
    """A quantised matrix."""

    integers: Tensor
    """int8 ``[out, in]``; those beyond -127 to 127 are replaced by the nearest end."""
    steps: Tensor
    """fp16 ``[in]``."""
    classes: Tensor
    """uint8 ``[in]``, below 64."""
    places: Tensor
    """int64 ``[n]``, rising: flat indices of integers beyond int8."""
    values: Tensor
    """int32 ``[n]``: those integers."""
    row_classes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """uint8 ``[out]``: classes of the rows' own factors, see `row_factors`; empty: there are none."""


@dataclass(frozen=True)
class Columns:
    """What the steps of a matrix's columns follow from."""

    name: str
    num_rows: int
    largest: Tensor
    """float64 ``[in]``: largest magnitudes."""
    squares: Tensor
    """float64 ``[in]``: mean squares of the weights."""
    ratios: Tensor
    """float64 ``[in]``: sensitivities over their mean."""
    scale: float
    """``a`` of the module; infinite if nothing is known of the matrix."""

    @classmethod
    def of(cls, name: str, weight: Tensor, sensitivity: Tensor) -> Columns:
        """Look at a matrix once.

        Args:
            name: For messages.
            weight: fp32 ``[out, in]``.
            sensitivity: ``[in]``: how much errors of each column matter. All 0 (nothing was seen) counts as all equal.

        Raises:
            UnsupportedModel: If weights or sensitivities are not finite, or shapes do not fit.
        """
        _check(name, weight, sensitivity)
        sensitivity = sensitivity.double()
        mean = float(sensitivity.mean())
        ratios = sensitivity / mean if mean > 0 else torch.ones_like(sensitivity)
        squares, largest = weight.double().square().mean(0), weight.abs().amax(0).double()
        scale = mean / len(weight)
        return cls(name, len(weight), largest, squares, ratios, scale if scale > 0 else math.inf)

    def relative_steps(self, typical: float) -> Tensor:
        """Return the steps, float64 ``[in]``, as if the factor were 1, before bounds."""
        scale = self.scale / typical if math.isfinite(self.scale) else 1.0
        relative: Tensor = self.ratios.clamp_min(FLOOR) ** -EXPONENT * scale**-EXPONENT
        return relative

    def steps(self, rule: StepRule) -> Tensor:
        """Return the steps of rounding, fp32 ``[in]``, exact in fp16. No column of other weights than 0 vanishes.

        Raises:
            UnsupportedModel: If a weight is so large that its integer is not exact.
        """
        steps = torch.minimum(self.relative_steps(rule.typical) * rule.factor, self.largest)
        steps = steps.clamp(SMALLEST_STEP, LARGEST_STEP).half().float()
        if bool((self.largest / steps > LARGEST_INTEGER).any()):
            raise UnsupportedModel(
                f"{self.name} has a weight of {float(self.largest.max()):.3g}, which is too large for steps in fp16. "
                "Leave this matrix uncompressed."
            )
        return steps

    def classes(self, steps: Tensor) -> Tensor:
        """Return the classes of columns, int64 ``[in]``: their root mean square in steps, on a scale of quarter octaves."""
        spread = (self.squares.sqrt() / steps).clamp_min(2.0**SMALLEST_OCTAVE).log2()
        return ((spread - SMALLEST_OCTAVE) * CLASSES_PER_OCTAVE).round().clamp(0, CLASSES - 1).long()


def _check(name: str, weight: Tensor, sensitivity: Tensor) -> None:
    if weight.ndim != 2 or weight.numel() == 0 or sensitivity.shape != weight.shape[1:]:
        raise UnsupportedModel(
            f"{name} has shape {list(weight.shape)} and statistics of {list(sensitivity.shape)} inputs; a matrix [out, in] and "
            "statistics [in] are needed. Leave it uncompressed."
        )
    if not bool(weight.isfinite().all()):
        raise UnsupportedModel(f"{name} holds NaN or infinite weights, which have no step. Repair the checkpoint.")
    if not bool((sensitivity.isfinite() & (sensitivity >= 0)).all()):
        raise UnsupportedModel(
            f"The statistics of the inputs of {name} are NaN, infinite or negative. "
            "Gather them again in a dtype in which the model does not overflow."
        )


def solve_columns(weights: Mapping[str, Tensor], columns: list[Columns], bits: float) -> StepRule:
    """Find the steps with which a model takes the bits that are asked, to within 1e-4 a weight and never more.

    Reads the weights some four or five times, a matrix at a time; a mapping that loads what it is asked for serves
    models larger than memory. A model whose columns allow no such step (tiny, or all 0) gets the finest one below.

    Args:
        weights: Matrices ``[out, in]`` by name, of any floating dtype.
        columns: The columns of each.
        bits: Bits a weight, all counted: steps, classes, exceptions, and the overhead of the code.

    Raises:
        PolicyError: If the bits are too few even for the coarsest steps, or beyond 8.
        UnsupportedModel: If a matrix cannot be quantised; the message has its name.
    """
    if not 0 < bits <= 8:
        raise PolicyError(
            f"{bits} bits a weight were asked of the entropy-coded quantizer, which has 8 at most. Ask for 2 to 8."
        )
    scales = [x.scale for x in columns if math.isfinite(x.scale)]
    typical = median_low(scales) if scales else 1.0

    def excess(exponent: float) -> float:
        return count_bits(weights, columns, _rule(exponent, typical)) - bits

    return _rule(_solve(excess, _first_guess(columns, typical, bits), bits), typical)


def _rule(exponent: float, typical: float) -> StepRule:
    # Few digits keep differences of logarithms between machines out of the steps.
    return StepRule(float(np.float32(2.0**exponent)), typical)


def _first_guess(columns: list[Columns], typical: float, bits: float) -> float:
    """Logarithm of the factor if all columns were Gaussian and steps fine."""
    total = logs = 0.0
    for x in columns:
        known = x.squares > 0
        logs += float((0.5 * x.squares[known].log2() - x.relative_steps(typical)[known].log2()).sum()) * x.num_rows
        total += int(known.sum()) * x.num_rows
    return logs / total + GAUSSIAN_BITS - bits if total else 0.0


def _solve(excess: Callable[[float], float], guess: float, bits: float) -> float:
    """Find where a falling function of slope -1 or so is just below 0: the secant, within a bracket once there is one."""
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    x, reach = guess, 1.0
    for _ in range(MOST_PASSES):
        y = excess(x)
        if -TOLERANCE <= y <= 0:
            return x
        below, above = ((x, y), above) if y <= 0 else (below, (x, y))
        if below is None or above is None:
            if abs(x - guess) > 30:
                break
            x += math.copysign(max(abs(y) * 1.01, 1e-4) if abs(y) < reach else reach, y)
            reach *= 2
            continue
        width = below[0] - above[0]
        if width < 1e-6:
            break
        part = (above[1] + TOLERANCE / 2) / (above[1] - below[1])
        # Where the function has steps the secant crawls, so it stays off the ends.
        x = above[0] + width * min(max(part, 0.02), 0.98)
    if below is None:
        raise PolicyError(
            f"{bits} bits a weight are too few: with the coarsest steps these matrices take {bits + y:.2f}, because every "
            f"column needs {COLUMN_BITS} bits of its own. Ask for more bits, or leave small matrices uncompressed."
        )
    return below[0]


def count_bits(weights: Mapping[str, Tensor], columns: Iterable[Columns], rule: StepRule) -> float:
    """Return the bits a weight that a model takes with some steps, without keeping its integers."""
    counts, outside, num_columns = np.zeros((CLASSES, SYMBOLS), np.int64), 0, 0
    for x in columns:
        steps = x.steps(rule)
        weight = weights[x.name].float().contiguous()
        outside += count_columns(weight.numpy(), steps.numpy(), x.classes(steps).numpy(), counts)
        num_columns += len(steps)
    return _bits(counts, outside, num_columns)


def _bits(counts: np.ndarray, outside: int, num_columns: int) -> float:
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    entropy = -(counts * np.log2(np.where(shares > 0, shares, 1))).sum()
    total = float(entropy) * CODE_OVERHEAD + outside * EXCEPTION_BITS + num_columns * COLUMN_BITS
    return total / int(counts.sum())


def quantize_columns(weight: Tensor, columns: Columns, rule: StepRule) -> Coded:
    """Quantise a matrix, fp32 ``[out, in]`` and contiguous, whose columns were looked at before."""
    steps = columns.steps(rule)
    integers = torch.empty(weight.shape, dtype=torch.int8)
    products, squares = np.zeros(len(steps)), np.zeros(len(steps))
    outside = round_columns(weight.numpy(), steps.numpy(), integers.numpy(), products, squares)
    places, values = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    if outside:
        exact = (weight / steps).round().flatten()
        places = (exact.abs() > LARGEST).nonzero().flatten()
        values = exact[places].int()
    fitted = torch.from_numpy(products / squares.clip(1)).clamp(0, LARGEST_STEP).half()
    fitted = torch.where(fitted > 0, fitted, steps.half())
    return Coded(integers, fitted, columns.classes(steps).to(torch.uint8), places, values)


def row_factors(classes: Tensor) -> Tensor:
    """Return the factors of rows, fp32 ``[out]``, of their classes, uint8 ``[out]``: four to the octave, 128 is 1."""
    quarters = torch.tensor([1, 2**0.25, 2**0.5, 2**0.75], dtype=torch.float32)
    number = classes.long()
    return torch.ldexp(quarters[number % 4], number // 4 - 32)


def dequantize(coded: Coded) -> Tensor:
    """Return the weights, fp32 ``[out, in]``: products of integers and steps, rounded; times the row's factor, rounded."""
    integers = coded.integers.float()
    integers.view(-1)[coded.places] = coded.values.float()
    weight = integers * coded.steps.float()
    return weight * row_factors(coded.row_classes)[:, None] if len(coded.row_classes) else weight


def multiply_into(coded: Mapping[str, Tensor], target: Tensor) -> None:
    """Fill a matrix as `dequantize` does, to the bit. On a GPU nothing is waited for, and no copy of it in fp32 is made.

    Args:
        coded: ``integers``, ``steps``, ``places`` and ``values`` of a `Coded` matrix, and ``factors`` of its rows, fp32
            ``[out]``.
        target: ``[out, in]``, contiguous, in any floating dtype, on their device.
    """
    steps, places, factors = coded["steps"].float(), coded["places"], coded["factors"]
    numbers = coded["values"].float() * steps[places % len(steps)] * factors[places // len(steps)]
    parts = (x.split(max(1, NUMBERS_AT_ONCE // len(steps))) for x in (coded["integers"], factors[:, None], target))
    for integers, own, rows in zip(*parts, strict=True):
        torch.mul(integers * steps, own, out=rows)  # computed in fp32
    target.view(-1)[places] = numbers.to(target.dtype)


def bits(coded: Iterable[Coded]) -> float:
    """Return the bits a weight that matrices take together: entropy by class of columns, steps, classes, exceptions, rows."""
    counts, outside, num_columns, num_factors = np.zeros(CLASSES * SYMBOLS, np.int64), 0, 0, 0
    for x in coded:
        symbols = x.classes.long() * SYMBOLS + x.integers.long() + 128
        counts += torch.bincount(symbols.flatten(), minlength=len(counts)).numpy()
        outside += len(x.places)
        num_columns += len(x.steps)
        num_factors += len(x.row_classes)
    return _bits(counts.reshape(CLASSES, SYMBOLS), outside, num_columns) + num_factors * ROW_BITS / int(counts.sum())

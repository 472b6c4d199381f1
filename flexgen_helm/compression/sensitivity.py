"""Steps that know what errors of weights do to the output of their layer: finer where it is sensitive.

A probe is a random vector ``v`` for each token of a text, of unit variance and divided by the norm of the layer's output there.
``g``, the gradient of ``sum v * output`` at the output of a matrix, tells how the layer passes errors on: if errors ``e_ij`` of
the weights are independent, the expected relative error of the layer's output is ``sum_ij e_ij**2 * mean(g_i**2 x_j**2)`` (mean
over tokens and probes: Hutchinson's estimator). The backward stays within a layer, so one layer in memory is enough.
Gradients of the whole model's loss (Fisher's diagonal) give much the same steps, at little gain (runs/LOG.md).

That mean is taken as the product of one number for each column, ``c_j = mean(|g|**2 x_j**2)``, and one for each row,
``r_i = mean(g_i**2)``. Steps are products as well: that of the column, which `flexgen_helm.compression.entropy` takes from c,
times ``clamp(r_i / mean r, 0.03, 30)**-0.3``, which is rounded to quarters of octaves and stored as the row's factor, a byte.
In theory all exponents are -1/2; they are damped because errors of several layers add up.

Weights divided by their row's factor are quantised and stored as `flexgen_helm.compression.entropy` does it.

Shapes: out rows, in columns of a linear layer's weight ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexgen_helm.compression.entropy import (
    ROW_BITS,
    Coded,
    Columns,
    StepRule,
    quantize_columns,
    row_factors,
    solve_columns,
)
from flexgen_helm.errors import UnsupportedModel

ROW_EXPONENT = 0.3
LEAST_ROW, MOST_ROW = 0.03, 30.0
"""Rows that matter less or more than these shares of the mean get no coarser or finer steps."""
PER_OCTAVE, NO_FACTOR = 4, 128
"""Classes of row factors in an octave, and that of the factor 1."""


@dataclass(frozen=True)
class Sensitivity:
    """What errors of a matrix do."""

    columns: Tensor
    """float32 ``[in]``: means of the squared input times the squared norm of the gradient."""
    rows: Tensor
    """float32 ``[out]``: mean squares of the gradient at the output."""


class SensitivityStatistics:
    """Sums over tokens of what `Sensitivity` means."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        """Nothing is seen yet."""
        self.columns = torch.zeros(num_inputs, dtype=torch.float64)
        self.rows = torch.zeros(num_outputs, dtype=torch.float64)
        self.num_tokens = 0

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Count some tokens.

        Args:
            inputs: ``[tokens, in]`` of the matrix, of any dtype, on any device.
            gradients: ``[tokens, out]`` at its output.
        """
        squares = gradients.float().square()
        weighted = inputs.float().square() * squares.sum(1, keepdim=True)
        self.columns += weighted.sum(0, dtype=torch.float64).cpu()
        self.rows += squares.sum(0, dtype=torch.float64).cpu()
        self.num_tokens += len(inputs)

    def mean(self, num_tokens: int) -> Sensitivity:
        """Return the means over so many tokens of the text; those that an expert did not see count as 0."""
        return Sensitivity((self.columns / num_tokens).float(), (self.rows / num_tokens).float())


def probe(hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return probes of a layer's output: what its gradient starts from.

    Args:
        hidden: ``[..., hidden]``.
        generator: Of the CPU, so that all devices take the same numbers.
    """
    norms = hidden.detach().float().norm(dim=-1, keepdim=True)
    chance = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    found: Tensor = (chance / norms.clamp_min(torch.finfo(torch.float32).tiny)).to(hidden.dtype)
    return found


def classes_of_rows(rows: Tensor) -> Tensor:
    """Return the classes of the rows' factors, uint8 ``[out]``, from `Sensitivity.rows`."""
    rows = rows.double()
    mean = float(rows.mean())
    ratios = rows / mean if mean > 0 else torch.ones_like(rows)
    octaves = ratios.clamp(LEAST_ROW, MOST_ROW).log2() * -ROW_EXPONENT
    return ((octaves * PER_OCTAVE).round() + NO_FACTOR).to(torch.uint8)


def solve_steps(weights: Mapping[str, Tensor], sensitivities: Mapping[str, Sensitivity], bits: float) -> StepRule:
    """Find the steps with which a model takes the bits that are asked; see `flexgen_helm.compression.entropy.solve_columns`.

    Args:
        weights: Matrices ``[out, in]`` by name, of any floating dtype.
        sensitivities: What errors of each of them do.
        bits: Bits a weight, all counted.

    Raises:
        PolicyError: If the bits are too few even for the coarsest steps, or beyond 8.
        UnsupportedModel: If a matrix cannot be quantised; the message has its name.
    """
    classes = {name: _classes(name, each) for name, each in sensitivities.items()}
    scaled = _Scaled(weights, classes)
    columns = [Columns.of(name, weight, sensitivities[name].columns) for name, weight in scaled.items()]
    num_weights = sum(x.num_rows * len(x.squares) for x in columns)
    factors = ROW_BITS * sum(x.num_rows for x in columns) / max(1, num_weights)
    return solve_columns(scaled, columns, bits - factors)


def quantize(weight: Tensor, sensitivity: Sensitivity, rule: StepRule, *, name: str = "A matrix") -> Coded:
    """Quantise a matrix with a model's steps.

    Args:
        weight: ``[out, in]`` of any floating dtype, on the CPU.
        sensitivity: What its errors do.
        rule: From `solve_steps`.
        name: For messages.

    Raises:
        UnsupportedModel: If weights or sensitivities are not finite, shapes do not fit, or a weight is too large.
    """
    classes = _classes(name, sensitivity)
    scaled = _divided(weight, classes)
    coded = quantize_columns(scaled, Columns.of(name, scaled, sensitivity.columns), rule)
    return replace(coded, row_classes=classes)


class _Scaled(Mapping[str, Tensor]):
    """Matrices whose rows are divided by their factors."""

    def __init__(self, weights: Mapping[str, Tensor], classes: Mapping[str, Tensor]) -> None:
        self._weights, self._classes = weights, classes

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __getitem__(self, name: str) -> Tensor:
        return _divided(self._weights[name], self._classes[name])


def _divided(weight: Tensor, classes: Tensor) -> Tensor:
    if weight.shape[:1] != classes.shape:
        raise UnsupportedModel(
            f"A matrix has shape {list(weight.shape)} and statistics of {len(classes)} outputs; they must be those of its "
            "rows. Leave it uncompressed."
        )
    return (weight.float() / row_factors(classes)[:, None]).contiguous()


def _classes(name: str, sensitivity: Sensitivity) -> Tensor:
    if not bool((sensitivity.rows.isfinite() & (sensitivity.rows >= 0)).all()):
        raise UnsupportedModel(
            f"The gradients at the outputs of {name} are NaN, infinite or negative. "
            "Gather them again in a dtype in which the model does not overflow."
        )
    return classes_of_rows(sensitivity.rows)

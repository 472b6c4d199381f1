"""Where a candidate differs from a reference: the error of each layer's weights, and of its output for the same input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runtime.engine import Engine

LAYER_TOKENS = 256
"""Tokens whose hidden states before all of the reference's layers are in memory together."""


class _Ratio:
    """A relative root mean square, summed piece by piece."""

    def __init__(self) -> None:
        self._wrong = self._right = 0.0

    def add(self, right: Tensor, other: Tensor) -> None:
        right, other = right.float(), other.float()
        self._wrong += float((other - right).square().sum(dtype=torch.float64))
        self._right += float(right.square().sum(dtype=torch.float64))

    @property
    def value(self) -> float | None:
        """None: nothing was added, or nothing but zeros."""
        return math.sqrt(self._wrong / self._right) if self._right else None


def layer_errors(reference: Engine, candidate: Engine, tokens: Sequence[int]) -> dict[str, Any]:
    """Return the relative RMS error of each layer: of its weights, and of its output for the reference's input.

    The error of a tensor y against x is sqrt(sum (y - x)^2 / sum x^2). An output is the hidden state behind a layer, with what
    the residual connection carries past it.

    Args:
        reference: Its hidden states are the input of the candidate's layers.
        candidate: An engine of the same model.
        tokens: One sequence; its first `LAYER_TOKENS` tokens are used.

    Returns:
        ``embedding``, the error of what the first layer is given, and ``layers``: number, ``weights`` and ``output`` of each.
        A value is None where nothing can be compared, such as weights of other names.

    Raises:
        FlexGenError: If the models differ in layers or rows.
    """
    rows = [engine.numerics.rows for engine in (reference, candidate)]
    if reference.num_layers != candidate.num_layers or rows[0] != rows[1]:
        raise FlexGenError(
            f"Layers cannot be compared one by one: the models have {reference.num_layers} and {candidate.num_layers} "
            f"layers, in {rows[0].kind} and {rows[1].kind} rows. Leave --per-layer out, or give --rows single."
        )
    states = _outputs(reference, candidate, list(tokens)[:LAYER_TOKENS])
    return {
        "embedding": states[0].value,
        "layers": [
            {"layer": j, "weights": _weights(reference, candidate, j), "output": states[j + 1].value}
            for j in range(reference.num_layers)
        ],
    }


def _outputs(reference: Engine, candidate: Engine, tokens: list[int]) -> list[_Ratio]:
    """Return the errors of the hidden states before each layer, and behind the last one."""
    kept: dict[tuple[int, int], Tensor] = {}
    errors = [_Ratio() for _ in range(reference.num_layers + 1)]

    def keep(j: int, k: int, hidden: Tensor) -> None:
        kept[j, k] = hidden.clone()

    def measure(j: int, k: int, hidden: Tensor) -> Tensor:
        right = kept[j, k]
        if right.shape != hidden.shape:
            raise FlexGenError(
                f"Layers cannot be compared one by one: hidden states have the shapes {tuple(right.shape)} and "
                f"{tuple(hidden.shape)}. Leave --per-layer out."
            )
        errors[j].add(right, hidden)
        return right

    reference.probe_layers(tokens, keep)
    candidate.probe_layers(tokens, measure)
    return errors


def _weights(reference: Engine, candidate: Engine, j: int) -> float | None:
    with reference.layer_weights(j) as right, candidate.layer_weights(j) as others:
        return _relative(right, others)


def _relative(right: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float | None:
    error = _Ratio()
    for name, weight in right.items():
        other = others.get(name)
        if other is not None and other.shape == weight.shape:
            error.add(weight, other)
    return error.value


def costliest(errors: Mapping[str, Any], count: int = 5) -> list[dict[str, Any]]:
    """Return the layers whose outputs are furthest off, the worst first."""
    layers = [layer for layer in errors["layers"] if layer["output"] is not None]
    return sorted(layers, key=lambda layer: -layer["output"])[:count]

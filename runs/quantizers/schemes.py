"""The quantizers that are compared: from all weights of a model to weights that have lost what each of them loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from flexgen_helm.compression import columns, entropy, minmax, sensitivity
from flexgen_helm.compression.allocation import LADDERS, allocate, column_errors
from flexgen_helm.compression.coding import encode
from flexgen_helm.compression.sensitivity import Sensitivity


@dataclass(frozen=True)
class Quantised:
    """Weights after quantising and dequantising."""

    weights: dict[str, Tensor]
    """float32 ``[out, in]`` by name."""
    bits: float
    """Bits per weight, with scales and maps."""


@dataclass(frozen=True)
class Statistics:
    """What schemes may know of a model besides its weights; by name."""

    over_random_ids: Mapping[str, Sensitivity]
    """What errors do, over random ids; empty where no scheme asks for it."""
    over_own_text: Mapping[str, Sensitivity]
    """The same over the model's own text."""


Scheme = Callable[[Mapping[str, Tensor], Statistics, int], Quantised]
"""Takes weights ``[out, in]`` by name, statistics, and bits of the scheme's name."""


def quantise_minmax(weights: Mapping[str, Tensor], statistics: Statistics, bits: int) -> Quantised:
    """FlexGen's format, which needs no statistics."""
    stored = {name: minmax.MinMax(bits).quantize(weight) for name, weight in weights.items()}
    num_bits = sum(codes.num_bits for codes in stored.values())
    return Quantised({name: minmax.dequantize(codes) for name, codes in stored.items()}, num_bits / num_weights(weights))


def quantise_columns(weights: Mapping[str, Tensor], statistics: Statistics, bits: int) -> Quantised:
    """Columns of several widths in a fixed layout."""
    scores = [column_errors(weight, statistics.over_random_ids[name].columns) for name, weight in weights.items()]
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights.values()]
    widths = allocate(scores, shapes, bits)
    stored = {
        name: columns.quantize(weight, width, LADDERS[bits])
        for (name, weight), width in zip(weights.items(), widths, strict=True)
    }
    num_bits = sum(matrix.num_bits for matrix in stored.values())
    return Quantised({name: columns.dequantize(matrix) for name, matrix in stored.items()}, num_bits / num_weights(weights))


def quantise_entropy(weights: Mapping[str, Tensor], statistics: Statistics, bits: int) -> Quantised:
    """Steps that know the output of the layer, entropy-coded; bits are those of the real frames."""
    return _coded(weights, statistics.over_random_ids, bits)


def quantise_self(weights: Mapping[str, Tensor], statistics: Statistics, bits: int) -> Quantised:
    """The same from the model's own text."""
    return _coded(weights, statistics.over_own_text, bits)


def _coded(weights: Mapping[str, Tensor], known: Mapping[str, Sensitivity], bits: int) -> Quantised:
    rule = sensitivity.solve_steps(weights, known, bits + 0.5)
    coded = {name: sensitivity.quantize(weight, known[name], rule, name=name) for name, weight in weights.items()}
    num_bits = 8 * sum(encode(each).num_bytes for each in coded.values())
    return Quantised({name: entropy.dequantize(x) for name, x in coded.items()}, num_bits / num_weights(weights))


def num_weights(weights: Mapping[str, Tensor]) -> int:
    """Return the number of all weights."""
    return sum(weight.numel() for weight in weights.values())


SCHEMES: dict[str, Scheme] = {
    "minmax": quantise_minmax,
    "columns": quantise_columns,
    "entropy": quantise_entropy,
    "self": quantise_self,
}
"""By name. The first is what the others are compared with."""

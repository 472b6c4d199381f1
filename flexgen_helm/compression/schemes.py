"""The schemes of compressed weights: how each stores a matrix as tensors of a slab."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_helm.compression import columns, entropy, minmax, sensitivity
from flexgen_helm.compression.allocation import LADDERS, allocate, column_errors
from flexgen_helm.compression.coding import Decoder, Stored, decode_into, encode, layout_of
from flexgen_helm.compression.entropy import StepRule, row_factors
from flexgen_helm.compression.fused import unpack as fused
from flexgen_helm.compression.scheme import MatrixKey, Parts, Scheme
from flexgen_helm.compression.sensitivity import Sensitivity
from flexgen_helm.compression.unpack_kernel import unpack_columns, unpack_minmax

FORMAT_VERSION = 4
"""Version of all stored forms and of how they are fitted: raised whenever the bytes of a slab may change."""


def scheme_of(name: str, bits: float) -> Scheme:
    """Return a scheme.

    Args:
        name: "fixed", "minmax", "self" or "entropy".
        bits: Bits per weight in all.
    """
    if name in ("entropy", "self"):
        return EntropyCoded(bits, own_text=name == "self")
    whole = int(bits)
    return FixedColumns(whole) if name == "fixed" else MinMaxGroups(whole)


@dataclass(frozen=True)
class MinMaxGroups:
    """FlexGen's scheme: see `flexgen_helm.compression.minmax`."""

    bits: int
    needs_statistics = False
    own_text = False

    def observe(self, weight: Tensor, known: Sensitivity) -> Parts:
        """Return nothing."""
        return {}

    def solve(self, observed: Mapping[MatrixKey, Parts], weights: Mapping[MatrixKey, Tensor]) -> dict[MatrixKey, Parts]:
        """Decide nothing."""
        return {}

    def pack(self, weight: Tensor, decided: Parts) -> Parts:
        """Return codes, scales and minima."""
        stored = minmax.MinMax(self.bits).quantize(weight)
        return {"codes": stored.codes, "scale": stored.scale, "minimum": stored.minimum}

    def unpack(self, stored: Parts, target: Tensor) -> None:
        """Compute a matrix."""
        group = minmax.MinMax(self.bits).group
        found = minmax.MinMaxCodes(len(target), self.bits, group, stored["codes"], stored["scale"], stored["minimum"])
        if target.device.type == "cpu":
            unpack_minmax(found, target)
        elif fused.serves(target.device, target.dtype):
            fused.unpack_minmax(found, target)
        else:
            target.copy_(minmax.dequantize(found))


@dataclass(frozen=True)
class FixedColumns:
    """Columns of several widths: see `flexgen_helm.compression.columns`."""

    bits: int
    needs_statistics = True
    own_text = False

    def observe(self, weight: Tensor, known: Sensitivity) -> Parts:
        """Return the error of each column at 4 bits, and the matrix's shape."""
        return {"errors": column_errors(weight, known.columns), "shape": torch.tensor(weight.shape)}

    def solve(self, observed: Mapping[MatrixKey, Parts], weights: Mapping[MatrixKey, Tensor]) -> dict[MatrixKey, Parts]:
        """Choose the width of each column."""
        shapes = [(int(parts["shape"][0]), int(parts["shape"][1])) for parts in observed.values()]
        widths = allocate([parts["errors"] for parts in observed.values()], shapes, self.bits)
        return {key: {"widths": each} for key, each in zip(observed, widths, strict=True)}

    def pack(self, weight: Tensor, decided: Parts) -> Parts:
        """Return codes, scales, and the map of widths."""
        found = columns.quantize(weight, decided["widths"], LADDERS[self.bits])
        unit = torch.tensor([found.unit], dtype=torch.float64)
        return {
            "counts": torch.empty(0, *found.counts, dtype=torch.uint8),  # in its shape, which the host knows
            "classes": found.classes,
            "codes": found.codes,
            "super_scales": found.super_scales,
            "scales": found.scales,
            "unit": unit,
        }

    def unpack(self, stored: Parts, target: Tensor) -> None:
        """Compute a matrix."""
        parts = (stored[name] for name in ("classes", "codes", "super_scales", "scales"))
        shape, counts = (target.shape[0], target.shape[1]), tuple(stored["counts"].shape[1:])
        on_cpu = target.device.type == "cpu"
        unit = float(stored["unit"]) if on_cpu else stored["unit"].float()
        found = columns.Columns(shape, LADDERS[self.bits], counts, unit, *parts)
        if on_cpu:
            unpack_columns(found, target)
        elif fused.serves(target.device, target.dtype):
            fused.unpack_columns(found, target)
        else:
            target.copy_(columns.dequantize(found))


@dataclass(frozen=True)
class EntropyCoded:
    """Integers with a step for each column and a factor for each row, entropy-coded.

    See `flexgen_helm.compression.entropy` and `flexgen_helm.compression.sensitivity`.
    """

    bits: float
    own_text: bool = False
    needs_statistics = True

    def observe(self, weight: Tensor, known: Sensitivity) -> Parts:
        """Return what errors of the matrix do."""
        return {"columns": known.columns, "rows": known.rows}

    def solve(self, observed: Mapping[MatrixKey, Parts], weights: Mapping[MatrixKey, Tensor]) -> dict[MatrixKey, Parts]:
        """Find the steps of the whole model."""
        known = {key: Sensitivity(parts["columns"], parts["rows"]) for key, parts in observed.items()}
        rule = sensitivity.solve_steps(weights, known, self.bits)
        numbers = torch.tensor([rule.factor, rule.typical], dtype=torch.float64)
        return {key: {**parts, "rule": numbers.clone()} for key, parts in observed.items()}

    def pack(self, weight: Tensor, decided: Parts) -> Parts:
        """Return frames of integers, steps, classes of the rows' factors, and what is needed to decode them."""
        known = Sensitivity(decided["columns"], decided["rows"])
        found = encode(sensitivity.quantize(weight, known, StepRule(*decided["rule"].tolist())))
        sizes = torch.tensor(found.sizes, dtype=torch.int64)
        return {
            "classes": found.classes,
            "steps": found.steps,
            "places": found.places,
            "values": found.values,
            "sizes": sizes,
            "data": found.data,
            "rows": found.row_classes,
        }

    def carried(self, stored: Parts, shape: tuple[int, int]) -> Parts:
        """Return a byte for each integer, steps, integers that no byte holds, and factors of rows, in sizes."""
        kept = {name: stored[name] for name in ("steps", "places", "values")}
        integers, factors = torch.empty(shape, dtype=torch.int8, device="meta"), torch.empty(shape[0], device="meta")
        return {"integers": integers, **kept, "factors": factors}

    def decode(self, stored: Parts, carried: Parts) -> None:
        """Decode the integers and copy everything else."""
        decode_into(self._stored(stored, len(carried["integers"])), carried["integers"])
        for name in ("steps", "places", "values"):
            carried[name].copy_(stored[name])
        carried["factors"].copy_(row_factors(stored["rows"]))

    def unpack(self, carried: Parts, target: Tensor) -> None:
        """Compute a matrix."""
        entropy.multiply_into(carried, target)

    def load(self, stored: Parts, target: Tensor) -> None:
        """Decode and unpack block by block."""
        found, decoder = self._stored(stored, len(target)), Decoder()
        for block in range(found.layout.num_blocks):
            decoder.unpack(found, block, target)

    def _stored(self, parts: Parts, num_rows: int) -> Stored:
        layout, sizes = layout_of(num_rows, parts["classes"]), tuple(parts["sizes"].tolist())
        classes, steps, places, values = (parts[name] for name in ("classes", "steps", "places", "values"))
        return Stored(layout, classes, steps, places, values, sizes, parts["data"], parts["rows"])

"""FlexGen's format of weights: groups along the output channels, each with the minimum and the scale of its range.

Numbers are those of FlexGen's CPU code (FlexLLMGen, ``compression.py``; paper section 5). In float32 are computed
``scale = (2**bits - 1) / (max - min)`` and ``code = round((x - min) * scale)``; then scale and minimum are rounded to float16.
The weight is ``code / scale + min``.
Where FlexGen's scale overflows float16 (a range below 2.3e-4 at 4 bits) and its group becomes one number, ours is the largest
float16, so that nothing is lost. A last group of fewer rows has its own range; FlexGen fills it with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_helm.compression.checks import require_quantizable
from flexgen_helm.compression.packing import pack, unpack
from flexgen_helm.errors import PolicyError

LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class MinMaxCodes:
    """A stored matrix ``[out, in]``."""

    num_rows: int
    """``out``."""
    bits: int
    """Bits of a code."""
    group: int
    """Rows of a group; the last one may have fewer."""
    codes: Tensor
    """uint8 ``[packed_rows(out, bits), in]``, see `flexgen_helm.compression.packing`."""
    scale: Tensor
    """float16 ``[groups, in]``: codes for each unit of the weight."""
    minimum: Tensor
    """float16 ``[groups, in]``."""

    @property
    def num_bits(self) -> int:
        """Bits of everything stored."""
        return 8 * self.codes.numel() + 16 * (self.scale.numel() + self.minimum.numel())


@dataclass(frozen=True)
class MinMax:
    """The scheme: how many bits, and how many rows share a scale."""

    bits: int
    """2, 3, 4 or 8."""
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8) or self.group < 1:
            raise PolicyError(
                f"Weights of {self.bits} bits in groups of {self.group} are not offered, because the formats have other codes. "
                "Use 2, 3, 4 or 8 bits, and a group of at least 1."
            )

    def quantize(self, weight: Tensor) -> MinMaxCodes:
        """Quantise a matrix.

        Args:
            weight: ``[out, in]``, any dtype.

        Raises:
            UnsupportedModel: If a number is NaN, infinite, or larger than float16 can hold.
        """
        require_quantizable(weight, f"w{self.bits}-minmax", LARGEST_FLOAT16)
        parts = [self._quantize(part) for part in _groups(weight.float(), self.group)]
        codes, scale, minimum = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return MinMaxCodes(len(weight), self.bits, self.group, pack(codes, self.bits), scale, minimum)

    def _quantize(self, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise ``[groups, rows, in]``: codes ``[groups * rows, in]``, scale and minimum ``[groups, in]``."""
        minimum, maximum = groups.amin(1), groups.amax(1)
        scale = ((2**self.bits - 1) / (maximum - minimum)).clamp(max=LARGEST_FLOAT16)
        codes = ((groups - minimum[:, None]) * scale[:, None]).round_().clamp_(0, 2**self.bits - 1)
        return codes.to(torch.uint8).flatten(0, 1), scale.half(), minimum.half()


def dequantize(stored: MinMaxCodes) -> Tensor:
    """Return the matrix in float32, ``[out, in]``."""
    codes = unpack(stored.codes, stored.bits, stored.num_rows).float()
    group_of_row = torch.arange(stored.num_rows, device=stored.codes.device) // stored.group
    return codes / stored.scale.float()[group_of_row] + stored.minimum.float()[group_of_row]


def _groups(weight: Tensor, group: int) -> list[Tensor]:
    """Cut ``[out, in]`` into ``[groups, group, in]`` and, where rows are left, ``[1, rest, in]``."""
    whole = len(weight) // group * group
    parts = (weight[:whole].view(-1, group, weight.shape[1]), weight[whole:].unsqueeze(0))
    return [part for part in parts if part.numel()]

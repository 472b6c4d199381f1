"""Min/max quantisation of K and V in plain torch, and how codes lie in bytes.

In float32 are computed, with ``n = 2**bits - 1`` and a cut of 0, or more for codes of 2 bits (`cut_of`)::

    low, high = minimum + cut * (maximum - minimum), maximum - cut * (maximum - minimum)
    zero  = low, rounded down to bfloat16
    scale = (high - zero) / n, rounded up to bfloat16
    code  = round((x - zero) / scale), halves to even, at least 0 and at most n
    value = code * scale + zero, rounded to the dtype in which attention reads

The product is exact, because code and scale have 8 significant bits each. So the error is at most half the scale where nothing
is cut, besides the rounding of the value. A scale of 0 means that all numbers are equal to `zero`, and their code is 0.

Larger numbers than `largest` count as that number, so that no value overflows. It leaves room for the rounding of the scale:
values lie within ``1 + 2**-6`` times the largest number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST, SHORTEST_CUT = 2, 0.05
"""Bits of the shortest codes, and what is cut of their ranges."""
LARGEST_HALF, LARGEST = 64256.0, 2.0**126
STEP = 1 << 16
"""From one bfloat16 to the next in the bits of float32."""


class Quantized(NamedTuple):
    """Numbers that were quantised along their last dimension.

    Attributes:
        codes: uint8 ``[..., n]``.
        numbers: bfloat16 ``[..., 2]``: scale and zero.
    """

    codes: Tensor
    numbers: Tensor


def largest(dtype: torch.dtype) -> float:
    """Return the magnitude that quantised numbers of a dtype have at most; a bfloat16."""
    return LARGEST_HALF if dtype == torch.float16 else LARGEST


def cut_of(bits: int) -> float:
    """Return the share of a range at each end whose numbers count as the next number inside.

    Four values lose less if they leave out the outermost numbers. More than this harms keys, of which those matter most.

    Args:
        bits: Bits of a code.
    """
    return SHORTEST_CUT if bits == SHORTEST else 0.0


def quantize(x: Tensor, bits: int) -> Quantized:
    """Quantise along the last dimension.

    Args:
        x: ``[..., n]``, finite.
        bits: Bits of a code, 1 to 8.
    """
    limit, most = largest(x.dtype), 2**bits - 1
    x = x.float().clamp(-limit, limit)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    margin = (high - low) * cut_of(bits)
    # Adding 0 makes 0 of -0, so that bytes do not depend on which of equal numbers is found.
    zero = _round_down(low + margin + 0.0)
    scale = _round_up((high - margin - zero) / most + 0.0)
    codes = ((x - zero) / torch.where(scale > 0, scale, 1)).round_().clamp_(0, most)
    return Quantized(codes.to(torch.uint8), torch.cat([scale, zero], -1).bfloat16())


def dequantize(codes: Tensor, numbers: Tensor) -> Tensor:
    """Return values in float32, ``[...]``.

    Args:
        codes: uint8 ``[...]``.
        numbers: ``[..., 2]``: scale and zero of each code, or such that they are broadcast.
    """
    scale, zero = numbers.float().unbind(-1)
    return codes.float() * scale + zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes: code i is in bits ``i * bits % 8`` and up of byte ``i * bits // 8``.

    Args:
        codes: uint8 ``[..., n]``, each below ``2**bits``.
        bits: 2, 4 or 8.

    Returns:
        uint8 ``[..., ceil(n * bits / 8)]``, filled up with zeros.
    """
    in_byte = 8 // bits
    parts = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % in_byte)).unflatten(-1, (-1, in_byte))
    packed: Tensor = parts[..., 0].clone()
    for i in range(1, in_byte):
        packed |= parts[..., i] << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the codes ``[..., n]``, uint8, that `pack` got."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts).bitwise_and_(2**bits - 1).flatten(-2)[..., :n]


def _round_down(x: Tensor) -> Tensor:
    """Round float32 to a bfloat16, held as float32, that is not larger."""
    bits = x.view(torch.int32)
    towards_zero = bits & -STEP
    return torch.where((x < 0) & (bits != towards_zero), towards_zero + STEP, towards_zero).view(torch.float32)


def _round_up(x: Tensor) -> Tensor:
    """Round float32 of at least 0 to a bfloat16, held as float32, that is not smaller."""
    return ((x.view(torch.int32) + (STEP - 1)) & -STEP).view(torch.float32)

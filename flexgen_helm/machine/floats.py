"""Numbers of 32 and 16 bits in loops compiled by Numba, which has no bfloat16 and computes with no float16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

from flexgen_helm.machine.compiled import size

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
"""What the bits of stored numbers mean."""
KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
FLOAT16_SCALE = np.float32(2.0**112)
"""The exponents of float16 are smaller by 112 than those of float32."""
HALF = np.float32(0.5)
Array = Any
"""A NumPy array; its shape is in the docstring."""


def _bitcast(source: Any, target: Any, width: Any) -> Any:
    def typed(typing_context: Any, number: Any) -> Any:
        return target(source), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], width)

    return intrinsic(typed)


number_of: Any = _bitcast(types.uint32, types.float32, ir.FloatType())
"""The float32 that has these bits."""
bits_of: Any = _bitcast(types.float32, types.uint32, ir.IntType(32))


@njit(inline="always")
def from_half(half):  # type: ignore[no-untyped-def]
    """A finite float16, given as uint16, in float32."""
    x = np.uint32(half)
    bits = ((x & np.uint32(0x8000)) << np.uint32(16)) | ((x & np.uint32(0x7FFF)) << np.uint32(13))
    return number_of(np.uint32(bits)) * FLOAT16_SCALE


@njit(inline="always")
def from_bfloat16(half):  # type: ignore[no-untyped-def]
    """A bfloat16, given as uint16, in float32."""
    return number_of(np.uint32(half) << np.uint32(16))


@njit(inline="always")
def to_bfloat16(number):  # type: ignore[no-untyped-def]
    """The bits of the bfloat16 next to a float32; halves go to even."""
    x = bits_of(number)
    return np.uint16((x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(inline="always")
def to_half(number):  # type: ignore[no-untyped-def]
    """The bits of the float16 next to a float32; halves go to even, what is too large is infinite."""
    bits = bits_of(number)
    x = np.uint32(bits & np.uint32(0x7FFFFFFF))
    # The last bit of a float32 at 0.5 is that of a subnormal float16: the addition rounds.
    subnormal = np.uint32(bits_of(number_of(x) + HALF) - np.uint32(0x3F000000))
    normal = np.uint32(x - np.uint32(0x38000000) + np.uint32(0xFFF) + ((x >> np.uint32(13)) & np.uint32(1)))
    normal = min(np.uint32(normal >> np.uint32(13)), np.uint32(0x7C00))
    found = subnormal if x < np.uint32(0x38800000) else normal
    return np.uint16(((bits >> np.uint32(16)) & np.uint32(0x8000)) | found)


@njit(nogil=True)
def store_numbers(numbers: Array, target: Array, kind: int) -> None:
    """Round float32 numbers to their stored form.

    Args:
        numbers: float32 ``[n]``, no NaN.
        target: uint32 or uint16 ``[n]``, filled.
        kind: What its bits mean.
    """
    if kind == FLOAT32:
        for i in range(size(len(target))):
            target[i] = bits_of(numbers[i])
    elif kind == BFLOAT16:
        for i in range(size(len(target))):
            target[i] = to_bfloat16(numbers[i])
    else:
        for i in range(size(len(target))):
            target[i] = to_half(numbers[i])


@njit(nogil=True)
def load_numbers(source: Array, numbers: Array, kind: int) -> None:
    """Bring finite stored numbers to float32.

    Args:
        source: uint32 or uint16 ``[n]``.
        numbers: float32 ``[n]``, filled.
        kind: What the bits mean.
    """
    if kind == FLOAT32:
        for i in range(size(len(numbers))):
            numbers[i] = number_of(np.uint32(source[i]))
    elif kind == BFLOAT16:
        for i in range(size(len(numbers))):
            numbers[i] = from_bfloat16(source[i])
    else:
        for i in range(size(len(numbers))):
            numbers[i] = from_half(source[i])


def bits_of_tensor(x: Tensor) -> Array:
    """Return a tensor's memory as unsigned integers of the numbers' size, in its shape."""
    if x.dtype == torch.float32:
        return x.view(torch.int32).numpy().view(np.uint32)
    return x.view(torch.int16).numpy().view(np.uint16)

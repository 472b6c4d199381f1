"""Joining the two byte planes of 16-bit weights, compiled by Numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexgen_helm.machine.compiled import compiled, size

u16 = np.uint16
Array = Any
"""A NumPy array; its shape is in the docstring."""


@compiled
def join_exponents(exponents: Array, rest: Array, halves: Array) -> None:
    """Join the planes of bf16 numbers.

    Args:
        exponents: uint8 ``[n]``.
        rest: uint8 ``[n]``: sign in bit 7, mantissa below.
        halves: uint16 ``[n]``, filled.
    """
    for i in range(size(len(halves))):
        x = u16(rest[i])
        halves[i] = u16(((x & u16(0x80)) << u16(8)) | (u16(exponents[i]) << u16(7)) | (x & u16(0x7F)))


@compiled
def join_bytes(high: Array, low: Array, halves: Array) -> None:
    """Join the bytes of 16-bit numbers.

    Args:
        high: uint8 ``[n]``: their upper bytes.
        low: uint8 ``[n]``: their lower bytes.
        halves: uint16 ``[n]``, filled.
    """
    for i in range(size(len(halves))):
        halves[i] = u16((u16(high[i]) << u16(8)) | u16(low[i]))

"""Which numbers of many are the largest: loops of sparse attention, compiled by Numba into those that call them.

Numba keeps a compiled loop until its own file changes: who changes this file touches those that import it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen_helm.attention.decode_intrinsics import above, at_least, num_above_last, num_ones
from flexgen_helm.machine.compiled import size

WORD = size(32)
"""Numbers whose choices are the bits of a uint32."""
f32, u32 = np.float32, np.uint32
HALF, INFINITY = f32(0.5), f32(np.inf)
NO_BITS = u32(0)
Array = Any
"""A NumPy array; its shape is in the docstring."""


@njit(inline="always")
def count_at_least(x: Array, limit: Any) -> Any:
    """How many numbers ``[n]`` are not below a limit; n is a multiple of 32."""
    count = np.int64(0)
    for i in range(size(0), size(len(x)), WORD):
        count += np.int64(num_ones(at_least(x, i, limit)))
    return count


@njit(fastmath={"nnan", "nsz"}, inline="always")
def _ends(x: Array) -> Any:
    """The smallest and the largest number above -inf."""
    low, high = INFINITY, -INFINITY
    for t in range(size(len(x))):
        low = min(low, x[t] if x[t] > -INFINITY else INFINITY)
        high = max(high, x[t])
    return low, high


@njit
def limit_of_largest(x: Array, wanted: int) -> Any:
    """Return a limit that at least ``wanted`` numbers reach, and that fewer, or as many, exceed.

    The interval in which the limit lies is halved until one of both counts is ``wanted``, or no number lies inside: about 14
    times for thousands of scores, each of which compares all numbers, which is faster than to sort them.

    Args:
        x: fp32 ``[n]``, n a multiple of 32; -inf is no number.
        wanted: At least 1, at most the numbers of x.
    """
    low, high = _ends(x)
    if count_at_least(x, high) >= wanted:
        return high
    while True:
        middle = HALF * low + HALF * high
        if not low < middle < high:
            return low
        count = count_at_least(x, middle)
        if count == wanted:
            return middle
        if count > wanted:
            low = middle
        else:
            high = middle


@njit(inline="always")
def _lowest(bits: Any, most: int) -> Any:
    """The lowest bits that are 1, at most as many."""
    while np.int64(num_ones(bits)) > most:
        bits = u32(bits & ~(u32(0x80000000) >> num_above_last(bits)))
    return bits


@njit(inline="always")
def choose_largest(x: Array, wanted: Any, bits: Array) -> None:
    """Choose the largest numbers; of equal ones the first.

    Args:
        x: fp32 ``[n]``, n a multiple of 32; -inf is no number. NaN is never chosen.
        wanted: How many, at most the numbers of x.
        bits: uint32 ``[n / 32]``, filled: bit t of word i is 1 if number 32 * i + t is chosen.
    """
    if wanted == 0:
        bits[:] = NO_BITS
        return
    limit, larger = limit_of_largest(x, wanted), np.int64(0)
    for i in range(size(len(bits))):
        bits[i] = above(x, WORD * i, limit)
        larger += np.int64(num_ones(bits[i]))
    equal = max(wanted - larger, np.int64(0))
    for i in range(size(len(bits))):
        first = _lowest(u32(at_least(x, WORD * i, limit) & ~bits[i]), equal)
        equal -= np.int64(num_ones(first))
        # More than wanted are larger only if one of them is infinite: then weights are no numbers.
        bits[i] = _lowest(u32(bits[i] | first), wanted)
        wanted -= np.int64(num_ones(bits[i]))

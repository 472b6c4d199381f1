"""Which numbers of many are the largest: loops of sparse attention, compiled by Numba into those that call them."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from flexgen_helm.attention.decode_intrinsics import FLOAT, LANES, WORD, data_of, repeated
from flexgen_helm.machine.compiled import size

PAGE = size(2 * LANES)
"""Numbers whose choices are the bits of a uint32."""
f32, u32 = np.float32, np.uint32
HALF, INFINITY, NEG_INF = f32(0.5), f32(np.inf), f32(-np.inf)
NO_BITS = u32(0)
Array = Any
"""A NumPy array; its shape is in the docstring."""


def _compared(builder: Any, operator: str, data: Any, first: Any, limits: Any) -> Any:
    """How 32 neighbouring numbers compare with limits, a bit each."""
    at = builder.bitcast(builder.gep(data, [first]), ir.VectorType(FLOAT, 2 * LANES).as_pointer())
    return builder.fcmp_ordered(operator, builder.load(at, align=4), limits)


def _comparison(operator: str) -> Any:
    """A function that compares 32 neighbouring numbers with a limit: bit t of its answer is for number t; NaN gives 0.

    Args of what is returned: flat array, index of the first number, limit.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, first, limit = arguments
        data = data_of(context, builder, signature.args[0], array)
        found = _compared(builder, operator, data, first, repeated(builder, limit, 2 * LANES))
        return builder.bitcast(found, ir.IntType(2 * LANES))

    def typed(typing_context: Any, array: Any, first: Any, limit: Any) -> Any:
        return types.uint32(array, first, limit), generate

    return intrinsic(typed)


at_least, above = _comparison(">="), _comparison(">")


def _of_bits(build: Any) -> Any:
    def typed(typing_context: Any, bits: Any) -> Any:
        return types.uint32(types.uint32), lambda context, builder, signature, arguments: build(builder, arguments[0])

    return intrinsic(typed)


num_ones: Any = _of_bits(lambda builder, bits: builder.ctpop(bits))
"""How many bits of 32 are 1."""
first_one: Any = _of_bits(lambda builder, bits: builder.cttz(bits, ir.Constant(ir.IntType(1), 0)))
"""Which is the lowest bit that is 1."""
num_above_last: Any = _of_bits(lambda builder, bits: builder.ctlz(bits, ir.Constant(ir.IntType(1), 0)))
"""How many bits are above the highest one that is 1."""


def _count(typing_context: Any, array: Any, limit: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        counts = ir.VectorType(WORD, 2 * LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(counts, [0] * (2 * LANES)))
        limits = repeated(builder, arguments[1], 2 * LANES)
        length = builder.extract_value(array.shape, 0)
        with cgutils.for_range(builder, builder.udiv(length, length.type(2 * LANES))) as loop:
            found = _compared(builder, ">=", array.data, builder.mul(loop.index, loop.index.type(2 * LANES)), limits)
            builder.store(builder.add(builder.load(total), builder.zext(found, counts)), total)
        kind = ir.FunctionType(WORD, [counts])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{2 * LANES}i32")
        return builder.zext(builder.call(reduce, [builder.load(total)]), ir.IntType(64))

    return types.int64(array, limit), generate


count_at_least: Any = intrinsic(_count)
"""How many numbers ``[n]`` are not below a limit; n is a multiple of 32. NaN is below."""


@njit(fastmath={"nnan", "nsz"})
def _ends(x: Array) -> Any:
    """The smallest and the largest number above -inf."""
    low, high = INFINITY, NEG_INF
    for t in range(size(len(x))):
        low = min(low, x[t] if x[t] > NEG_INF else INFINITY)
        high = max(high, x[t])
    return low, high


@njit
def limit_of_largest(x: Array, wanted: int) -> Any:
    """Return a limit: at least ``wanted`` numbers are not below it, and at most ``wanted`` are above it.

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
        bits[i] = above(x, PAGE * i, limit)
        larger += np.int64(num_ones(bits[i]))
    equal = max(wanted - larger, np.int64(0))
    for i in range(size(len(bits))):
        first = _lowest(u32(at_least(x, PAGE * i, limit) & ~bits[i]), equal)
        equal -= np.int64(num_ones(first))
        # More than wanted are larger only if one of them is infinite: then weights are no numbers.
        bits[i] = _lowest(u32(bits[i] | first), wanted)
        wanted -= np.int64(num_ones(bits[i]))

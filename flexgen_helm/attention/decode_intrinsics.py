"""Blocks of numbers in vector registers: LLVM instructions for `flexgen_helm.attention.decode_kernel` that Numba does not emit.

Vectors of 16 numbers are LLVM's: on processors with narrower registers it takes several for each.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from flexgen_helm.machine.compiled import size

LANES = 16
"""Numbers in a vector; rows and columns of a block that is transposed."""
WORD, FLOAT = ir.IntType(32), ir.FloatType()


def _fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, signature, arguments: builder.fma(*arguments)


fma: Any = intrinsic(_fused)
"""``a * b + c``, rounded once, on every processor and in every loop."""


def _as_pointer(typing_context: Any, address: Any) -> Any:
    signature = types.voidptr(address)
    return signature, lambda context, builder, signature, arguments: builder.inttoptr(arguments[0], cgutils.voidptr_t)


_pointer: Any = intrinsic(_as_pointer)


@njit(inline="always")
def array_at(address, n, dtype):  # type: ignore[no-untyped-def]
    """The n numbers of a dtype that begin at an address."""
    return carray(_pointer(address), (n,), dtype)


def pointer_to(builder: Any, address: Any, kind: Any) -> Any:
    """An address, as a pointer to an LLVM type."""
    return builder.inttoptr(address, kind.as_pointer())


def repeated(builder: Any, number: Any, width: int) -> Any:
    """A vector of a number, as many times."""
    vector = ir.VectorType(FLOAT, width)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(WORD, width), [0] * width))


def data_of(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Where the numbers of an array begin."""
    return context.make_array(kind)(context, builder, array).data


def _transposition(  # noqa: PLR0913
    typing_context: Any, source: Any, first: Any, stride: Any, target: Any, start: Any, step: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, first, stride, target, start, step = arguments
        vector = ir.VectorType(WORD, LANES)

        def pointers(kind: Any, array: Any, index: Any, stride: Any) -> list[Any]:
            data, found = data_of(context, builder, kind, array), []
            for _ in range(LANES):
                found.append(builder.bitcast(builder.gep(data, [index]), vector.as_pointer()))
                index = builder.add(index, stride)
            return found

        rows = [builder.load(x, align=4) for x in pointers(signature.args[0], source, first, stride)]
        half = LANES // 2
        masks = [ir.Constant(vector, [y for i in range(begin, begin + half) for y in (i, LANES + i)]) for begin in (0, half)]
        # Dealing the rows out like cards, log2(16) times, puts every number into its column.
        for _ in range(LANES.bit_length() - 1):
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
        for row, x in zip(rows, pointers(signature.args[3], target, start, step), strict=True):
            builder.store(row, x, align=4)
        return context.get_dummy_value()

    return types.void(source, first, stride, target, start, step), generate


transpose_block: Any = intrinsic(_transposition)
"""Transpose 16 x 16 numbers of 32 bits.

Args: source, flat; index of its first number; numbers from one row to the next; target, flat; its first number; numbers from
one row to the next.
"""


def _product(num_rows: int, width: int) -> Any:
    """A product for a number of rows and of columns: see `multiply_add`."""
    vector = ir.VectorType(FLOAT, width)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, a_at, b, stride, n, c, c_at, first, column = (
            data_of(context, builder, kind, x) if isinstance(kind, types.Array) else x
            for kind, x in zip(signature.args, arguments, strict=True)
        )
        name, kind = f"llvm.fma.v{width}f32", ir.FunctionType(vector, [vector] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, name)
        rows = [builder.add(first, first.type(i)) for i in range(num_rows)]
        factors = [builder.gep(a, [builder.load(builder.gep(a_at, [i]))]) for i in rows]
        outputs = [builder.gep(c, [builder.add(builder.load(builder.gep(c_at, [i])), column)]) for i in rows]
        outputs = [builder.bitcast(x, vector.as_pointer()) for x in outputs]
        sums = [cgutils.alloca_once_value(builder, builder.load(x, align=4)) for x in outputs]
        with cgutils.for_range(builder, n) as loop:
            at = builder.gep(b, [builder.add(column, builder.mul(loop.index, stride))])
            row = builder.load(builder.bitcast(at, vector.as_pointer()), align=4)
            for factor, total in zip(factors, sums, strict=True):
                x = repeated(builder, builder.load(builder.gep(factor, [loop.index])), width)
                builder.store(builder.call(fused, [x, row, builder.load(total)]), total)
        for total, x in zip(sums, outputs, strict=True):
            builder.store(builder.load(total), x, align=4)
        return context.get_dummy_value()

    def typed(  # noqa: PLR0913 - Numba reads the names and their number
        typing_context: Any, a: Any, a_at: Any, b: Any, stride: Any, n: Any, c: Any, c_at: Any, first: Any, column: Any
    ) -> Any:
        return types.void(a, a_at, b, stride, n, c, c_at, first, column), generate

    return intrinsic(typed)


_one, _two, _three, _four = (_product(count, 2 * LANES) for count in (1, 2, 3, 4))
_one_narrow = _product(1, LANES)


@njit(inline="always")
def multiply_add(a, a_at, b, m, n, c, c_at, num_rows):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Add a product of matrices to rows of another: ``c[c_at[r] + j] += sum of a[a_at[r] + t] * b[t * m + j] over t``.

    Products are added one by one, in the order of t, each rounded once: a row's bits depend on its own numbers alone.

    Args:
        a: Flat: rows of n numbers.
        a_at: ``[num_rows]``: where each row begins.
        b: ``[n * m]``.
        m: Number of columns.
        n: Number of products for each sum.
        c: Flat: rows of m numbers, changed in place.
        c_at: ``[num_rows]``: where each row begins.
        num_rows: Number of rows.
    """
    wide, whole = m // size(2 * LANES) * size(2 * LANES), num_rows // size(4) * size(4)
    for j in range(size(0), wide, size(2 * LANES)):
        for r in range(size(0), whole, size(4)):
            _four(a, a_at, b, m, n, c, c_at, r, j)
        if num_rows - whole == size(1):
            _one(a, a_at, b, m, n, c, c_at, whole, j)
        elif num_rows - whole == size(2):
            _two(a, a_at, b, m, n, c, c_at, whole, j)
        elif num_rows - whole == size(3):
            _three(a, a_at, b, m, n, c, c_at, whole, j)
    narrow = m // size(LANES) * size(LANES)
    for r in range(num_rows):
        for j in range(wide, narrow, size(LANES)):
            _one_narrow(a, a_at, b, m, n, c, c_at, r, j)
        for j in range(narrow, m):
            for t in range(n):
                c[c_at[r] + j] = fma(a[a_at[r] + t], b[t * m + j], c[c_at[r] + j])

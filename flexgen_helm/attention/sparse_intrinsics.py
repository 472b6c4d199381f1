"""More blocks of numbers in vector registers, for `flexgen_helm.attention.sparse_decode_kernel`: see `decode_intrinsics`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from flexgen_helm.attention.decode_intrinsics import FLOAT, LANES, WORD, data_of, fma, pointer_to, repeated
from flexgen_helm.machine.compiled import size

VECTOR = ir.VectorType(FLOAT, LANES)
LINE = 64
"""Bytes that a processor brings at a time."""


def _vector(builder: Any, data: Any, index: Any) -> Any:
    """The vector that begins at an index of flat numbers."""
    return builder.load(builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer()), align=4)


def _sums(builder: Any, parts: list[Any]) -> Any:
    """The sum of the 16 numbers of each of 16 vectors, as one vector."""
    neighbours, quarters = list(range(0, LANES, 4)), [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27]
    steps = [
        [[i + k for k in neighbours for i in each] for each in ([0, 16, 1, 17], [2, 18, 3, 19])],
        [[i + k for k in neighbours for i in each] for each in ([0, 1, 16, 17], [2, 3, 18, 19])],
        *[[quarters, [i + 4 for i in quarters]]] * 2,
    ]
    for step in steps:
        masks = [ir.Constant(ir.VectorType(WORD, LANES), mask) for mask in step]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks)) for a, b in pairs]
    return parts[0]


def _dot_products(  # noqa: PLR0913 - Numba reads the names and their number
    typing_context: Any, q: Any, q_at: Any, k: Any, k_at: Any, stride: Any, n: Any, c: Any, c_at: Any
) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        q, q_at, k, k_at, stride, n, c, c_at = (
            data_of(context, builder, kind, x) if isinstance(kind, types.Array) else x
            for kind, x in zip(signature.args, arguments, strict=True)
        )
        fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3), f"llvm.fma.v{LANES}f32")
        rows = [builder.add(k_at, builder.mul(stride, stride.type(t))) for t in range(LANES)]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES)) for _ in rows]
        with cgutils.for_range(builder, n) as loop:
            column = builder.mul(loop.index, loop.index.type(LANES))
            factor = _vector(builder, q, builder.add(q_at, column))
            for row, total in zip(rows, sums, strict=True):
                key = _vector(builder, k, builder.add(row, column))
                builder.store(builder.call(fused, [factor, key, builder.load(total)]), total)
        at = builder.bitcast(builder.gep(c, [c_at]), VECTOR.as_pointer())
        builder.store(_sums(builder, [builder.load(total) for total in sums]), at, align=4)
        return context.get_dummy_value()

    return types.void(q, q_at, k, k_at, stride, n, c, c_at), generate


_sixteen: Any = intrinsic(_dot_products)


@njit(inline="always")
def dot_products(q, q_at, k, dim, c, c_at, num_rows):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Multiply rows with the 32 keys of a page: ``c[c_at[r] + t] = sum of q[q_at[r] + d] * k[t * dim + d] over d``.

    A row's bits depend on its own numbers alone.

    Args:
        q: Flat: rows of dim numbers.
        q_at: ``[num_rows]``: where each row begins.
        k: ``[32 * dim]``.
        dim: Number of products for each sum.
        c: Flat, changed.
        c_at: ``[num_rows]``: where 32 numbers of each row begin.
        num_rows: Number of rows.
    """
    whole = dim // size(LANES)
    for r in range(num_rows):
        for t in range(size(0), size(2 * LANES), size(LANES)):
            _sixteen(q, q_at[r], k, t * dim, dim, whole, c, c_at[r] + t)
        for t in range(size(2 * LANES)):
            for d in range(whole * size(LANES), dim):
                c[c_at[r] + t] = fma(q[q_at[r] + d], k[t * dim + d], c[c_at[r] + t])


def _gathered_product(width: int) -> Any:
    """A weighted sum of rows of some columns: see `add_rows`."""
    vector = ir.VectorType(FLOAT, width)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, a_at, b, b_at, n, c, c_at = (
            data_of(context, builder, kind, x) if isinstance(kind, types.Array) else x
            for kind, x in zip(signature.args[:-1], arguments[:-1], strict=True)
        )
        column = arguments[-1]
        kind = ir.FunctionType(vector, [vector] * 3)
        fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{width}f32")
        output = builder.bitcast(builder.gep(c, [builder.add(c_at, column)]), vector.as_pointer())
        total = cgutils.alloca_once_value(builder, builder.load(output, align=4))
        with cgutils.for_range(builder, n) as loop:
            at = builder.add(builder.load(builder.gep(b_at, [loop.index])), column)
            row = builder.load(builder.bitcast(builder.gep(b, [at]), vector.as_pointer()), align=4)
            factor = repeated(builder, builder.load(builder.gep(a, [builder.add(a_at, loop.index)])), width)
            builder.store(builder.call(fused, [factor, row, builder.load(total)]), total)
        builder.store(builder.load(total), output, align=4)
        return context.get_dummy_value()

    def typed(  # noqa: PLR0913 - Numba reads the names and their number
        typing_context: Any, a: Any, a_at: Any, b: Any, b_at: Any, n: Any, c: Any, c_at: Any, column: Any
    ) -> Any:
        return types.void(a, a_at, b, b_at, n, c, c_at, column), generate

    return intrinsic(typed)


_gathered_wide, _gathered_narrow = _gathered_product(4 * LANES), _gathered_product(LANES)


@njit(inline="always")
def add_rows(a, a_at, b, b_at, n, c, c_at, m):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Add a weighted sum of rows to another one: ``c[c_at + j] += sum of a[a_at + t] * b[b_at[t] + j] over t``.

    Products are added one by one, in the order of t, each rounded once.

    Args:
        a: Flat.
        a_at: Where n weights begin.
        b: Flat: rows of m numbers.
        b_at: ``[n]`` or longer: where each row begins.
        n: Number of rows.
        c: Flat, changed in place.
        c_at: Where m numbers begin.
        m: Numbers of a row.
    """
    wide, narrow = m // size(4 * LANES) * size(4 * LANES), m // size(LANES) * size(LANES)
    for j in range(size(0), wide, size(4 * LANES)):
        _gathered_wide(a, a_at, b, b_at, n, c, c_at, j)
    for j in range(wide, narrow, size(LANES)):
        _gathered_narrow(a, a_at, b, b_at, n, c, c_at, j)
    for j in range(narrow, m):
        for t in range(n):
            c[c_at + j] = fma(a[a_at + t], b[b_at[t] + j], c[c_at + j])


def _prefetch(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[WORD] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, kept, of_data = WORD(0), WORD(3), WORD(1)
        builder.call(function, [pointer_to(builder, arguments[0], ir.IntType(8)), to_read, kept, of_data])
        return context.get_dummy_value()

    return types.void(address), generate


_prefetch_line: Any = intrinsic(_prefetch)


@njit(inline="always")
def prefetch(address, num_bytes):  # type: ignore[no-untyped-def]
    """Let the processor bring bytes to its cache while it computes."""
    for i in range(0, num_bytes, LINE):
        _prefetch_line(address + i)

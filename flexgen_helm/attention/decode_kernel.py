"""The loop that computes attention of decode rows on the CPU, compiled by Numba: K and V are read in their pages.

Its loops run over chunks of 128 keys, K/V heads, and the queries that visit the chunk. What a query gets follows from its own
keys in this order alone: pages of 32 keys are computed as a whole, and keys that it does not see get weight 0. So neither
neighbours nor the place of a page change a bit (levels B and A). Everything is computed in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from flexgen_helm.attention.row_pages import CHUNK_TOKENS
from flexgen_helm.kv_cache.pages import PAGE_TOKENS

REORDERED = {"contract", "reassoc", "nsz"}
"""Sums over the keys of one query may be reordered: the same query has as many keys whatever its neighbours are."""
FP32, BFLOAT16, FLOAT16 = 0, 1, 2
"""What the bits of stored numbers mean."""
FLOAT16_SCALE = np.float32(2.0**112)
"""The exponents of fp16 are smaller by 112 than those of fp32."""
KEY_STRIDE = CHUNK_TOKENS + 16
"""A power of two would put a column of keys into few sets of the processor's cache."""
f32 = np.float32
LOG2E = f32(1.4426950408889634)
VANISHES = f32(-127.0)
"""2 to this power is no normal number; it counts as 0."""
NEG_INF = f32(-np.inf)
C1, C2, C3, C4, C5, C6 = (
    f32(x)
    for x in (
        *(0.6931471805599453, 0.2402265069591007, 0.05550410866482158),
        *(0.009618129107628477, 0.0013333558146428443, 0.00015403530393381608),
    )
)
"""ln(2)**n / n!: the series of 2**x, which between -0.5 and 0.5 is as exact as fp32."""
Array = Any
"""A NumPy array; its shape is in the docstring."""
size = np.uint64
"""Type of indices: Numba lets signed ones count from the end, which keeps loops from being vectorised."""


def _fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, signature, arguments: builder.fma(*arguments)


_fma: Any = intrinsic(_fused)
"""``a * b + c``, rounded once, on every processor and in every loop."""


@njit(inline="always")
def _load_keys(stored, page, head, kind, keys, bits, first):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Bring a head of a stored page of K into the columns ``first`` to ``first + 31`` of fp32 ``[D, 144]``, made flat.

    Args:
        stored: Pages, as bits ``[pages, H_kv, 32, D]``.
        page: Number of the page.
        head: K/V head.
        kind: What the bits mean.
        keys: fp32 ``[D * 144]``.
        bits: The same memory as uint32.
        first: First column.
    """
    for t in range(size(PAGE_TOKENS)):
        for d in range(size(stored.shape[3])):
            bits[d * size(KEY_STRIDE) + first + t] = _fp32_bits(stored[page, head, t, d], kind)
    if kind == FLOAT16:
        for d in range(size(stored.shape[3])):
            for t in range(size(PAGE_TOKENS)):
                keys[d * size(KEY_STRIDE) + first + t] *= FLOAT16_SCALE


@njit(inline="always")
def _load_values(stored, page, head, kind, values, bits, first):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Bring a head of a stored page of V into the rows ``first`` to ``first + 31`` of fp32 ``[128, Dv]``, made flat."""
    dim = size(stored.shape[3])
    for t in range(size(PAGE_TOKENS)):
        for d in range(dim):
            bits[(first + t) * dim + d] = _fp32_bits(stored[page, head, t, d], kind)
    if kind == FLOAT16:
        for i in range(first * dim, (first + size(PAGE_TOKENS)) * dim):
            values[i] *= FLOAT16_SCALE


@njit(inline="always")
def _fp32_bits(stored: Any, kind: int) -> Any:
    """The bits of a number as fp32; those of fp16 must still be multiplied with `FLOAT16_SCALE`."""
    x = np.uint32(stored)
    if kind == FP32:
        return x
    if kind == BFLOAT16:
        return x << np.uint32(16)
    return ((x & np.uint32(0x8000)) << np.uint32(16)) | ((x & np.uint32(0x7FFF)) << np.uint32(13))


@njit(inline="always")
def _add_rows(factors, matrix, stride, total):  # type: ignore[no-untyped-def]
    """Add the product of factors ``[n]`` and the rows of a matrix to ``total [m]``, eight rows at a time.

    Args:
        factors: One for each row.
        matrix: ``[>= n * stride]``: rows of at least m numbers.
        stride: Numbers from one row to the next.
        total: Changed in place.
    """
    n, m = size(len(factors)), size(len(total))
    for i in range(size(0), n // size(8) * size(8), size(8)):
        f0, f1, f2, f3 = factors[i], factors[i + size(1)], factors[i + size(2)], factors[i + size(3)]
        f4, f5, f6, f7 = factors[i + size(4)], factors[i + size(5)], factors[i + size(6)], factors[i + size(7)]
        r0 = i * stride
        r1, r2, r3, r4 = r0 + stride, r0 + size(2) * stride, r0 + size(3) * stride, r0 + size(4) * stride
        r5, r6, r7 = r4 + stride, r4 + size(2) * stride, r4 + size(3) * stride
        for j in range(m):
            low = _fma(f3, matrix[r3 + j], _fma(f2, matrix[r2 + j], _fma(f1, matrix[r1 + j], f0 * matrix[r0 + j])))
            high = _fma(f7, matrix[r7 + j], _fma(f6, matrix[r6 + j], _fma(f5, matrix[r5 + j], f4 * matrix[r4 + j])))
            total[j] += low + high
    for i in range(n // size(8) * size(8), n):
        for j in range(m):
            total[j] = _fma(factors[i], matrix[i * stride + j], total[j])


@njit(fastmath={"nnan", "nsz"}, inline="always")
def _largest(x: Array) -> Any:
    top = NEG_INF
    for t in range(size(len(x))):
        top = max(top, x[t])
    return top


@njit(fastmath=REORDERED, inline="always")
def _sum(x: Array) -> Any:
    total = f32(0)
    for t in range(size(len(x))):
        total += x[t]
    return total


@njit(inline="always")
def _powers_of_two(x: Array, exponents: Array) -> None:
    """Replace numbers of at most 0 by 2 to their power; NaN stays."""
    for t in range(size(len(x))):
        y = max(x[t], VANISHES)
        whole = np.floor(y + f32(0.5))
        r = y - whole
        exponents[t] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        series = _fma(r, _fma(r, _fma(r, C6, C5), C4), C3)
        x[t] = _fma(r, _fma(r, _fma(r, series, C2), C1), f32(1))
    powers = exponents.view(np.float32)
    for t in range(size(len(x))):
        x[t] *= powers[t]


@njit(inline="always")
def _finish_scores(scores: Array, visible: int, mask: Array, scale: float, softcap: float) -> None:
    """Turn products into scores in units of log2, -inf for keys that are not seen; see `attend_chunks`."""
    if softcap > f32(0):
        for t in range(size(len(scores))):
            scores[t] = np.tanh(scores[t] * (scale / softcap)) * (softcap * LOG2E)
    else:
        for t in range(size(len(scores))):
            scores[t] *= scale * LOG2E
    for t in range(size(visible), size(len(scores))):
        scores[t] = NEG_INF
    if len(mask):
        for t in range(size(len(scores))):
            scores[t] = scores[t] if mask[t] else NEG_INF


def _compiled(function: Any) -> Any:
    """Compile at the first call, and keep the machine code on disk where a folder can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@_compiled
def attend_chunks(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - Numba infers types, and knows no dataclasses
    queries, k, v, kind, places, pages, begins, rows, visible, masks, scale, softcap, top, den, total
):
    """Attend with some queries of a row to C chunks, in V visits.

    Args:
        queries: fp32 ``[T, H, D]``.
        k: For each place its pages of K, as bits: uint32 or uint16 ``[pages, H_kv, 32, D]``.
        v: For each place its pages of V ``[pages, H_kv, 32, Dv]``, likewise.
        kind: What the bits mean: `FP32`, `BFLOAT16` or `FLOAT16`.
        places: ``[C, 4]``: the place of each page of a chunk.
        pages: ``[C, 4]``: its number there.
        begins: ``[C + 1]``: the first visit of each chunk. Chunks of one query are in order of position.
        rows: ``[V]``: the query of each visit.
        visible: ``[V]``: keys of the chunk up to the query's own, 1 to 128.
        masks: bool ``[V, 128]``: the keys that the query's mask shows; ``[0, 128]``: all.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``. 0: they stay.
        top: ``[T, H]``, -inf at first. Becomes the largest score of each query, in units of log2.
        den: ``[T, H]``, 0 at first. Becomes the sum of the weights relative to it.
        total: ``[T, H, Dv]``, 0 at first. Becomes the weighted sum of the values.
    """
    groups, dim, value_dim = queries.shape[1] // k[0].shape[1], queries.shape[2], total.shape[2]
    keys, values = np.empty(dim * KEY_STRIDE, np.float32), np.empty(CHUNK_TOKENS * value_dim, np.float32)
    key_bits, value_bits = keys.view(np.uint32), values.view(np.uint32)
    no_mask = np.empty(0, np.bool_)
    scores, exponents = np.empty(CHUNK_TOKENS, np.float32), np.empty(CHUNK_TOKENS, np.int32)
    for c in range(len(pages)):
        most = 0
        for i in range(begins[c], begins[c + 1]):
            most = max(most, visible[i])
        for h in range(k[0].shape[1]):
            for p in range((most + PAGE_TOKENS - 1) // PAGE_TOKENS):
                page, first = size(pages[c, p]), size(p * PAGE_TOKENS)
                _load_keys(k[places[c, p]], page, size(h), kind, keys, key_bits, first)
                _load_values(v[places[c, p]], page, size(h), kind, values, value_bits, first)
            for i in range(begins[c], begins[c + 1]):
                n, count = rows[i], (visible[i] + PAGE_TOKENS - 1) // PAGE_TOKENS * PAGE_TOKENS
                mask = masks[i] if len(masks) else no_mask
                weights = scores[:count]
                for j in range(h * groups, (h + 1) * groups):
                    weights[:] = 0
                    _add_rows(queries[n, j], keys, size(KEY_STRIDE), weights)
                    _finish_scores(weights, visible[i], mask, scale, softcap)
                    new = max(top[n, j], _largest(weights))
                    if new == NEG_INF:
                        continue
                    for t in range(size(count)):
                        weights[t] -= new
                    _powers_of_two(weights, exponents)
                    before = f32(2) ** (top[n, j] - new)
                    top[n, j], den[n, j] = new, den[n, j] * before + _sum(weights)
                    for d in range(size(value_dim)):
                        total[n, j, d] *= before
                    _add_rows(weights, values, size(value_dim), total[n, j])

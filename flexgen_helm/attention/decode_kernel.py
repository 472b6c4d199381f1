"""The loop that computes attention of decode rows on the CPU, compiled by Numba: K and V are read in their pages.

Its loops run over chunks of 128 keys, K/V heads, and the queries that visit the chunk. What a query gets follows from its own
keys in this order alone: pages of 32 keys are computed as a whole, and keys that it does not see get weight 0. So neither
neighbours nor the place of a page change a bit (levels B and A). Everything is computed in fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

FUSED = {"contract"}
"""Products and sums may be fused. They are not reordered: no number depends on how many are computed at once."""
REORDERED = {"contract", "reassoc", "nsz"}
"""Sums over the keys of one query may be reordered: the same query has as many keys whatever its neighbours are."""
FP32, BFLOAT16, FLOAT16 = 0, 1, 2
"""What the bits of stored numbers mean."""
PAGE = 32
CHUNK_PAGES = 4
CHUNK = PAGE * CHUNK_PAGES
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


@njit(fastmath=FUSED, inline="always")
def _load(stored, page, head, kind, numbers, bits, first):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Bring a head of a stored page into memory as fp32.

    Args:
        stored: Pages, as bits ``[pages, H_kv, 32, D]``.
        page: Number of the page.
        head: K/V head.
        kind: What the bits mean.
        numbers: fp32 ``[>= first + 32, D]``, where they go.
        bits: The same memory as uint32.
        first: The first row there.
    """
    for t in range(PAGE):
        if kind == FP32:
            for d in range(numbers.shape[1]):
                bits[first + t, d] = stored[page, head, t, d]
        elif kind == BFLOAT16:
            for d in range(numbers.shape[1]):
                bits[first + t, d] = np.uint32(stored[page, head, t, d]) << np.uint32(16)
        else:  # the exponents of fp16 are smaller by 112 than those of fp32
            for d in range(numbers.shape[1]):
                bits[first + t, d] = np.uint32(stored[page, head, t, d] & np.uint16(0x7FFF)) << np.uint32(13)
            for d in range(numbers.shape[1]):
                numbers[first + t, d] *= f32(2.0**112)
            for d in range(numbers.shape[1]):
                bits[first + t, d] |= np.uint32(stored[page, head, t, d] & np.uint16(0x8000)) << np.uint32(16)


@njit(inline="always")
def _transpose(rows: Array, columns: Array, first: int) -> None:
    """Copy rows ``[32, D]`` to the columns ``first`` to ``first + 31`` of a matrix ``[D, >= first + 32]``."""
    for d in range(rows.shape[1]):
        for t in range(PAGE):
            columns[d, first + t] = rows[t, d]


@njit(fastmath=FUSED, inline="always")
def _add_rows(factors: Array, matrix: Array, total: Array) -> None:
    """Add the product of factors ``[n]`` and a matrix ``[>= n, >= m]`` to ``total [m]``, eight rows at a time."""
    n = len(factors)
    for i in range(0, n - 7, 8):
        f0, f1, f2, f3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        f4, f5, f6, f7 = factors[i + 4], factors[i + 5], factors[i + 6], factors[i + 7]
        for j in range(len(total)):
            first = f0 * matrix[i, j] + f1 * matrix[i + 1, j] + f2 * matrix[i + 2, j] + f3 * matrix[i + 3, j]
            second = f4 * matrix[i + 4, j] + f5 * matrix[i + 5, j] + f6 * matrix[i + 6, j] + f7 * matrix[i + 7, j]
            total[j] += first + second
    for i in range(n // 8 * 8, n):
        for j in range(len(total)):
            total[j] += factors[i] * matrix[i, j]


@njit(fastmath={"nnan", "nsz"}, inline="always")
def _largest(x: Array) -> Any:
    top = NEG_INF
    for t in range(len(x)):
        top = max(top, x[t])
    return top


@njit(fastmath=REORDERED, inline="always")
def _sum(x: Array) -> Any:
    total = f32(0)
    for t in range(len(x)):
        total += x[t]
    return total


@njit(fastmath=FUSED, inline="always")
def _powers_of_two(x: Array, exponents: Array) -> None:
    """Replace numbers of at most 0 by 2 to their power; NaN stays."""
    for t in range(len(x)):
        y = max(x[t], VANISHES)
        whole = np.floor(y + f32(0.5))
        r = y - whole
        exponents[t] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        x[t] = f32(1) + r * (C1 + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * C6)))))
    powers = exponents.view(np.float32)
    for t in range(len(x)):
        x[t] *= powers[t]


@njit(fastmath=FUSED, inline="always")
def _finish_scores(scores: Array, visible: int, mask: Array, scale: float, softcap: float) -> None:
    """Turn products into scores in units of log2, -inf for keys that are not seen; see `attend_chunks`."""
    if softcap > f32(0):
        for t in range(len(scores)):
            scores[t] = np.tanh(scores[t] * (scale / softcap)) * (softcap * LOG2E)
    else:
        for t in range(len(scores)):
            scores[t] *= scale * LOG2E
    for t in range(visible, len(scores)):
        scores[t] = NEG_INF
    if len(mask):
        for t in range(len(scores)):
            scores[t] = scores[t] if mask[t] else NEG_INF


@njit(fastmath=FUSED, nogil=True, cache=True)
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
    keys, page_keys = np.empty((dim, CHUNK), np.float32), np.empty((PAGE, dim), np.float32)
    values = np.empty((CHUNK, value_dim), np.float32)
    key_bits, value_bits = page_keys.view(np.uint32), values.view(np.uint32)
    scores, exponents = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int32)
    for c in range(len(pages)):
        most = 0
        for i in range(begins[c], begins[c + 1]):
            most = max(most, visible[i])
        for h in range(k[0].shape[1]):
            for p in range((most + PAGE - 1) // PAGE):
                _load(k[places[c, p]], pages[c, p], h, kind, page_keys, key_bits, 0)
                _transpose(page_keys, keys, p * PAGE)
                _load(v[places[c, p]], pages[c, p], h, kind, values, value_bits, p * PAGE)
            for i in range(begins[c], begins[c + 1]):
                n, count = rows[i], (visible[i] + PAGE - 1) // PAGE * PAGE
                mask = masks[i] if len(masks) else np.empty(0, np.bool_)
                weights = scores[:count]
                for j in range(h * groups, (h + 1) * groups):
                    weights[:] = 0
                    _add_rows(queries[n, j], keys, weights)
                    _finish_scores(weights, visible[i], mask, scale, softcap)
                    new = max(top[n, j], _largest(weights))
                    if new == NEG_INF:
                        continue
                    for t in range(count):
                        weights[t] -= new
                    _powers_of_two(weights, exponents)
                    before = f32(2) ** (top[n, j] - new)
                    top[n, j], den[n, j] = new, den[n, j] * before + _sum(weights)
                    for d in range(value_dim):
                        total[n, j, d] *= before
                    _add_rows(weights, values, total[n, j])

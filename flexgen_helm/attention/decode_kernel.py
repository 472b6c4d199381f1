"""The loop that computes attention of decode rows on the CPU, compiled by Numba: K and V are read in their pages.

Its loops run over chunks of 128 keys, K/V heads, pages of 32 keys, and the queries that visit the chunk. What a query gets
follows from its own keys in this order alone: pages are computed as a whole, and keys that it does not see get weight 0. So
neither neighbours nor the place of a page change a bit (levels B and A). Everything is computed in fp32.

K and V of a head and a page pass through a buffer of fp32 that stays in the cache of a core: a chunk's exact pages are widened
and K transposed; of sealed pages codes are decoded, those of K at once into their place in the transposed buffer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from flexgen_helm.attention.decode_codes import unpack_keys, unpack_values
from flexgen_helm.attention.decode_intrinsics import LANES, array_at, fma, multiply_add, transpose_block
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, PAGE_TOKENS
from flexgen_helm.machine.compiled import compiled, size

REORDERED = {"contract", "reassoc", "nsz"}
"""Sums over the keys of one query may be reordered: the same query has as many keys whatever its neighbours are."""
FP32, BFLOAT16, FLOAT16, CODES = 0, 1, 2, 8
"""What the bits of stored numbers mean. `CODES` + b: codes of b bits, see `flexgen_helm.attention.decode_codes`."""
FLOAT16_SCALE = np.float32(2.0**112)
"""The exponents of fp16 are smaller by 112 than those of fp32."""
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


@njit(inline="always")
def load_stored(address, kind, numbers, bits):  # type: ignore[no-untyped-def]
    """Bring a head of a stored page to fp32.

    Args:
        address: Where its numbers begin.
        kind: What their bits mean.
        numbers: fp32 ``[32 * D]``, filled.
        bits: The same memory as uint32.
    """
    n = size(len(bits))
    if kind == FP32:
        words = array_at(address, n, np.uint32)
        for i in range(n):
            bits[i] = words[i]
        return
    halves = array_at(address, n, np.uint16)
    if kind == BFLOAT16:
        for i in range(n):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
        return
    for i in range(n):
        x = np.uint32(halves[i])
        bits[i] = ((x & np.uint32(0x8000)) << np.uint32(16)) | ((x & np.uint32(0x7FFF)) << np.uint32(13))
    for i in range(n):
        numbers[i] *= FLOAT16_SCALE


@njit(inline="always")
def _transpose(rows: Array, columns: Array) -> None:
    """Bring 32 rows ``[32 * D]`` into columns ``[D * 32]``."""
    dim = size(len(rows)) // size(PAGE_TOKENS)
    whole = dim // size(LANES) * size(LANES)
    for t in range(size(0), size(PAGE_TOKENS), size(LANES)):
        for d in range(size(0), whole, size(LANES)):
            transpose_block(rows, t * dim + d, dim, columns, d * size(PAGE_TOKENS) + t, size(PAGE_TOKENS))
    for d in range(whole, dim):
        for t in range(size(PAGE_TOKENS)):
            columns[d * size(PAGE_TOKENS) + t] = rows[t * dim + d]


@njit(inline="always")
def _read_keys(address, kind, dim, rows, bits, columns):  # type: ignore[no-untyped-def]
    """Bring K of a head and a page to fp32, channel after channel.

    Args:
        address: Where it begins.
        kind: What its bits mean.
        dim: Number of channels.
        rows: fp32 ``[32 * dim]``, overwritten.
        bits: The same memory as uint32.
        columns: fp32 ``[dim * 32]``, filled.
    """
    if kind > CODES:
        unpack_keys(address, kind - CODES, dim, columns)
    else:
        load_stored(address, kind, rows, bits)
        _transpose(rows, columns)


@njit(inline="always")
def _read_values(address, kind, dim, rows, bits):  # type: ignore[no-untyped-def]
    """Bring V of a head and a page to fp32, token after token: see `_read_keys`."""
    if kind > CODES:
        unpack_values(address, kind - CODES, dim, rows)
    else:
        load_stored(address, kind, rows, bits)


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
def powers_of_two(x: Array, exponents: Array) -> None:
    """Replace numbers of at most 0 by 2 to their power; NaN stays."""
    for t in range(size(len(x))):
        y = max(x[t], VANISHES)
        whole = np.floor(y + f32(0.5))
        r = y - whole
        exponents[t] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        series = fma(r, fma(r, fma(r, C6, C5), C4), C3)
        x[t] = fma(r, fma(r, fma(r, series, C2), C1), f32(1))
    powers = exponents.view(np.float32)
    for t in range(size(len(x))):
        x[t] *= powers[t]


@njit(inline="always")
def finish_scores(scores: Array, visible: int, mask: Array, scale: float, softcap: float) -> None:
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


@njit(inline="always")
def _num_pages(visible: Any) -> Any:
    return (visible + PAGE_TOKENS - 1) // PAGE_TOKENS


@njit(inline="always")
def _locate(visits, rows, visible, page, heads, dim, row_at, score_at):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Where the numbers of all query heads begin that read a page, and where their scores of it do; their number.

    Args:
        visits: First and end.
        rows: ``[V]``, see `attend_chunks`.
        visible: ``[V]``, likewise.
        page: Which page of the chunk.
        heads: First, end, and number of all.
        dim: Numbers of a head.
        row_at: Filled: indices in ``[T, H, dim]``.
        score_at: Filled: indices in ``[visits, heads, 128]``.
    """
    first, end, num_heads = heads
    count = 0
    for i in range(visits[0], visits[1]):
        if page < _num_pages(visible[i]):
            for j in range(first, end):
                row_at[count] = (rows[i] * num_heads + j) * dim
                score_at[count] = ((i - visits[0]) * (end - first) + j - first) * CHUNK_TOKENS + page * PAGE_TOKENS
                count += 1
    return size(count)


@njit(inline="always")
def _weigh(scores, visible, mask, scale, softcap, before, exponents):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Turn a query's products with a chunk's keys into weights relative to the largest score so far.

    Args:
        scores: The products; become the weights.
        visible: See `attend_chunks`.
        mask: Likewise.
        scale: Likewise.
        softcap: Likewise.
        before: The largest score so far, in units of log2.
        exponents: int32 ``[128]``, overwritten.

    Returns:
        The largest score now, the factor for weights so far, and the sum of the new ones.
    """
    finish_scores(scores, visible, mask, scale, softcap)
    top = max(before, _largest(scores))
    if top == NEG_INF:
        scores[:] = 0
        return top, f32(1), f32(0)
    for t in range(size(len(scores))):
        scores[t] -= top
    powers_of_two(scores, exponents)
    return top, f32(2) ** (before - top), _sum(scores)


@compiled
def attend_chunks(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - Numba infers types, and knows no dataclasses
    queries, k, v, kinds, head_bytes, num_kv, begins, rows, visible, masks, scale, softcap, top, den, total
):
    """Attend with some queries of a row to C chunks, in V visits.

    Args:
        queries: fp32 ``[T, H, D]``.
        k: ``[C, 4]``: addresses of the chunks' pages of K, head after head: ``[32, D]`` or codes.
        v: ``[C, 4]``: addresses of their pages of V, head after head: ``[32, Dv]`` or codes.
        kinds: ``[C, 2]``: what the bits of each chunk's K and V mean: `FP32`, `BFLOAT16`, `FLOAT16` or `CODES` + 2, 4 or 8.
        head_bytes: ``[C, 2]``: bytes of a head of a page of K, and of one of V.
        num_kv: Number of K/V heads.
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
    heads, dim, value_dim = queries.shape[1], queries.shape[2], total.shape[2]
    groups = heads // num_kv
    flat_queries, flat_total = queries.reshape(-1), total.reshape(-1)
    loaded, columns = np.empty(PAGE_TOKENS * max(dim, value_dim), np.float32), np.empty(PAGE_TOKENS * dim, np.float32)
    keys, values = loaded[: PAGE_TOKENS * dim], loaded[: PAGE_TOKENS * value_dim]
    key_bits, value_bits = keys.view(np.uint32), values.view(np.uint32)
    most = np.max(begins[1:] - begins[:-1]) * groups
    scores, exponents, no_mask = (
        np.empty(most * CHUNK_TOKENS, np.float32),
        np.empty(CHUNK_TOKENS, np.int32),
        np.empty(0, np.bool_),
    )
    row_at, score_at = np.empty(most, np.int64), np.empty(most, np.int64)
    for c in range(len(k)):
        visits = begins[c], begins[c + 1]
        num_pages = _num_pages(np.max(visible[begins[c] : begins[c + 1]]))
        for h in range(num_kv):
            own = h * groups, (h + 1) * groups, heads
            scores[: (visits[1] - visits[0]) * groups * CHUNK_TOKENS] = 0
            for p in range(num_pages):
                count = _locate(visits, rows, visible, p, own, dim, row_at, score_at)
                _read_keys(k[c, p] + h * head_bytes[c, 0], kinds[c, 0], dim, keys, key_bits, columns)
                multiply_add(flat_queries, row_at, columns, size(PAGE_TOKENS), size(dim), scores, score_at, count)
            for i in range(visits[0], visits[1]):
                n, mask = rows[i], masks[i] if len(masks) else no_mask
                for g in range(groups):
                    j, first = h * groups + g, ((i - visits[0]) * groups + g) * CHUNK_TOKENS
                    seen = scores[first : first + _num_pages(visible[i]) * PAGE_TOKENS]
                    top[n, j], factor, sum_ = _weigh(seen, visible[i], mask, scale, softcap, top[n, j], exponents)
                    den[n, j] = den[n, j] * factor + sum_
                    for d in range(size(value_dim)):
                        total[n, j, d] *= factor
            for p in range(num_pages):
                count = _locate(visits, rows, visible, p, own, value_dim, row_at, score_at)
                _read_values(v[c, p] + h * head_bytes[c, 1], kinds[c, 1], value_dim, values, value_bits)
                multiply_add(scores, score_at, values, size(value_dim), size(PAGE_TOKENS), flat_total, row_at, count)

"""The loops of sparse attention of decode rows on the CPU, compiled by Numba: which keys a query reads, and their values.

They read pages as `flexgen_helm.attention.decode_kernel` does. What a query gets follows from its own keys in order alone.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from flexgen_helm.attention.decode_codes import unpack_keys, unpack_token
from flexgen_helm.attention.decode_intrinsics import multiply_add
from flexgen_helm.attention.decode_kernel import (
    CODES,
    NEG_INF,
    REORDERED,
    finish_scores,
    load_stored,
    powers_of_two,
)
from flexgen_helm.attention.selection import NO_BITS, choose_largest, first_one
from flexgen_helm.attention.sparse_intrinsics import add_rows, dot_products, prefetch
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PAGE_TOKENS
from flexgen_helm.machine.compiled import compiled, size

u32 = np.uint32
ONE = u32(1)
AHEAD = 4
"""Pages of which rows are brought before they are needed."""


@njit(fastmath={"nnan", "nsz"})
def _largest(x):  # type: ignore[no-untyped-def]
    top = NEG_INF
    for t in range(size(len(x))):
        top = max(top, x[t])
    return top


@njit(fastmath=REORDERED)
def _sum(x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for t in range(size(len(x))):
        total += x[t]
    return total


@njit(inline="always")
def _weigh(scores, bits, weights, exponents):  # type: ignore[no-untyped-def]
    """Turn a query's scores of its keys into weights relative to the largest.

    Args:
        scores: fp32 ``[keys]`` in units of log2; overwritten.
        bits: uint32 ``[keys / 32]``: the chosen keys of each page.
        weights: Filled: page after page the weights of its chosen keys, then the sum of the others.
        exponents: int32 ``[keys]`` or longer, overwritten.

    Returns:
        The largest score, and the sum of all weights.
    """
    top = _largest(scores)
    for t in range(size(len(scores))):
        scores[t] -= top
    powers_of_two(scores, exponents[: len(scores)])
    den, count = _sum(scores), size(0)
    for i in range(size(len(bits))):
        left, first = bits[i], size(PAGE_TOKENS) * i
        while left:
            at = first + size(first_one(left))
            weights[count], scores[at] = scores[at], 0
            left, count = u32(left & (left - ONE)), size(count + size(1))
        weights[count] = _sum(scores[first : first + size(PAGE_TOKENS)])
        count += size(1)
    return top, den


@njit(inline="always")
def _locate(visits, visitors, places, rows, starts, heads, dim, row_at, score_at):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Where the numbers of all query heads begin that read a chunk, and where their scores of it do; their number.

    Args:
        visits: First and end.
        visitors: See `choose_keys`, as for the three that follow.
        places: ``[V]``.
        rows: ``[Q]``.
        starts: ``[Q + 1]``.
        heads: First, end, and number of all.
        dim: Numbers of a head.
        row_at: Filled: indices in ``[T, H, dim]``.
        score_at: Filled: indices in the scores, for each query and head its keys.
    """
    first, end, num_heads = heads
    count = 0
    for i in range(visits[0], visits[1]):
        q = visitors[i]
        for j in range(first, end):
            row_at[count] = (rows[q] * num_heads + j) * dim
            score_at[count] = num_heads * starts[q] + j * (starts[q + 1] - starts[q]) + places[i] * CHUNK_TOKENS
            count += 1
    return count


@compiled
def choose_keys(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - Numba infers types, and knows no dataclasses
    queries,
    k,
    kinds,
    head_bytes,
    num_kv,
    begins,
    visitors,
    places,
    rows,
    starts,
    shown,
    wanted,
    scale,
    softcap,
    chosen,
    top,
    den,
):
    """Choose what Q queries of a row read of their sealed keys, in C chunks and V visits.

    Args:
        queries: fp32 ``[T, H, D]``.
        k: ``[C, 4]``: addresses of the chunks' pages of K.
        kinds: ``[C]``: what the bits of each chunk's K mean, see `flexgen_helm.attention.decode_kernel.attend_chunks`.
        head_bytes: ``[C]``: bytes of a head of a page of K.
        num_kv: Number of K/V heads.
        begins: ``[C + 1]``: the first visit of each chunk.
        visitors: ``[V]``: which of the Q queries visits.
        places: ``[V]``: which of the query's sealed chunks, by position, it visits.
        rows: ``[Q]``: the row position of each query.
        starts: ``[Q + 1]``: keys of all queries before each; each has whole chunks.
        shown: bool: for the keys of each query, one after the other, whether its mask shows them. Empty: it shows all.
        wanted: ``[Q]``: how many of them it reads.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)``. 0: they stay.
        chosen: bits and weights, filled. Bits are uint32: for each query and head its pages; see `_weigh` for the weights.
        top: ``[T, H]``, filled for these queries: the largest score, in units of log2.
        den: ``[T, H]``, likewise: the sum of all weights relative to it.
    """
    bits, weights = chosen
    heads, dim = queries.shape[1], queries.shape[2]
    groups, flat_queries = heads // num_kv, queries.reshape(-1)
    keys, no_mask = np.empty(PAGE_TOKENS * dim, np.float32), np.empty(0, np.bool_)
    key_bits = keys.view(np.uint32)
    scores, exponents = np.zeros(heads * starts[-1], np.float32), np.empty(np.max(starts[1:] - starts[:-1]), np.int32)
    most = np.max(begins[1:] - begins[:-1]) * groups
    row_at, score_at = np.empty(most, np.int64), np.empty(most, np.int64)
    for c in range(len(k)):
        visits = begins[c], begins[c + 1]
        for h in range(num_kv):
            own = h * groups, (h + 1) * groups, heads
            for p in range(CHUNK_PAGES):
                count = _locate(visits, visitors, places, rows, starts, own, dim, row_at, score_at)
                score_at[:count] += p * PAGE_TOKENS
                begin = k[c, p] + h * head_bytes[c]
                if kinds[c] > CODES:
                    unpack_keys(begin, kinds[c] - CODES, dim, keys)
                    multiply_add(flat_queries, row_at, keys, size(PAGE_TOKENS), size(dim), scores, score_at, size(count))
                else:
                    load_stored(begin, kinds[c], keys, key_bits)
                    dot_products(flat_queries, row_at, keys, size(dim), scores, score_at, size(count))
    at_weight = 0
    for q in range(len(rows)):
        num_keys = starts[q + 1] - starts[q]
        pages, mask = num_keys // PAGE_TOKENS, shown[starts[q] : starts[q + 1]] if len(shown) else no_mask
        for j in range(heads):
            first = heads * starts[q] + j * num_keys
            seen, seen_bits = scores[first : first + num_keys], bits[first // PAGE_TOKENS : first // PAGE_TOKENS + pages]
            finish_scores(seen, num_keys, mask, scale, softcap)
            choose_largest(seen, wanted[q], seen_bits)
            end = at_weight + wanted[q] + pages
            top[rows[q], j], den[rows[q], j] = _weigh(seen, seen_bits, weights[at_weight:end], exponents)
            at_weight = end


@njit(inline="always")
def _read_row(address, kind, dim, values, bits, first):  # type: ignore[no-untyped-def]
    """Bring a row of a page to fp32.

    Args:
        address: Where it begins.
        kind: What its bits mean.
        dim: Its numbers.
        values: fp32, flat.
        bits: The same memory as uint32.
        first: Where its numbers go.
    """
    if kind > CODES:
        unpack_token(address, kind - CODES, dim, values, first)
    else:
        load_stored(address, kind, values[first : first + dim], bits[first : first + dim])


@njit
def _unite(bits, unions):  # type: ignore[no-untyped-def]
    """Bits ``[pages]`` that any of some heads ``[heads * pages]`` has."""
    unions[:] = NO_BITS
    for j in range(0, len(bits), len(unions)):
        for i in range(size(len(unions))):
            unions[i] |= bits[j + i]


@njit(inline="always")
def _prefetch_rows(begin, row_bytes, read):  # type: ignore[no-untyped-def]
    """Let the processor bring chosen rows of a page: they are too far apart for it to guess them."""
    while read:
        prefetch(begin + np.int64(first_one(read)) * row_bytes, row_bytes)
        read = u32(read & (read - ONE))


@njit(inline="always")
def _read_rows(begin, row_bytes, kind, read, dim, values, bits):  # type: ignore[no-untyped-def]  # noqa: PLR0913
    """Bring chosen rows of a page to fp32, each to its place in ``[32 * dim]``."""
    while read:
        t = np.int64(first_one(read))
        _read_row(begin + t * row_bytes, kind, dim, values, bits, t * dim)
        read = u32(read & (read - ONE))


@njit(inline="always")
def _places(read, dim, places):  # type: ignore[no-untyped-def]
    """Where chosen rows of a page begin, and its mean, which is behind them; how many they are."""
    count = 0
    while read:
        places[count] = np.int64(first_one(read)) * dim
        read, count = u32(read & (read - ONE)), count + 1
    places[count] = PAGE_TOKENS * dim
    return count + 1


@compiled
def attend_chosen(  # type: ignore[no-untyped-def]  # noqa: PLR0913 - Numba infers types, and knows no dataclasses
    v, means, kinds, head_bytes, num_kv, chunks, rows, starts, wanted, chosen, total
):
    """Sum the values that Q queries chose by `choose_keys`, and the means of pages times the weights of the other keys.

    Args:
        v: ``[C, 4]``: addresses of the chunks' pages of V.
        means: ``[C, 4]``: addresses of their means of V.
        kinds: ``[C, 2]``: what the bits of each chunk's V and means mean.
        head_bytes: ``[C, 2]``: bytes of a head of a page of V, and of its mean.
        num_kv: Number of K/V heads.
        chunks: The chunk of each of the queries' sealed chunks, query after query, in order of position.
        rows: See `choose_keys`, as for all that follows.
        starts: ``[Q + 1]``.
        wanted: ``[Q]``.
        chosen: bits and weights.
        total: ``[T, H, Dv]``, 0 at first. Becomes the weighted sum of the values.
    """
    bits, weights = chosen
    heads, dim = total.shape[1], total.shape[2]
    groups, flat_total = heads // num_kv, total.reshape(-1)
    values, places = np.empty((PAGE_TOKENS + 1) * dim, np.float32), np.empty(PAGE_TOKENS + 1, np.int64)
    value_bits, at, at_query = values.view(np.uint32), np.empty(groups, np.int64), 0
    unions = np.empty(np.max(starts[1:] - starts[:-1]) // PAGE_TOKENS, np.uint32)
    for q in range(len(rows)):
        pages = (starts[q + 1] - starts[q]) // PAGE_TOKENS
        each = wanted[q] + pages
        for h in range(num_kv):
            for g in range(groups):
                at[g] = at_query + (h * groups + g) * each
            own = heads * (starts[q] // PAGE_TOKENS) + h * groups * pages
            _unite(bits[own : own + groups * pages], unions[:pages])
            for ahead in range(pages + AHEAD):
                if ahead < pages:
                    c, p = chunks[starts[q] // CHUNK_TOKENS + ahead // CHUNK_PAGES], ahead % CHUNK_PAGES
                    _prefetch_rows(v[c, p] + h * head_bytes[c, 0], head_bytes[c, 0] // PAGE_TOKENS, unions[ahead])
                    prefetch(means[c, p] + h * head_bytes[c, 1], head_bytes[c, 1])
                if ahead < AHEAD:
                    continue
                i = ahead - AHEAD
                c, p, read = chunks[starts[q] // CHUNK_TOKENS + i // CHUNK_PAGES], i % CHUNK_PAGES, unions[i]
                row_bytes = head_bytes[c, 0] // PAGE_TOKENS
                _read_rows(v[c, p] + h * head_bytes[c, 0], row_bytes, kinds[c, 0], read, dim, values, value_bits)
                _read_row(means[c, p] + h * head_bytes[c, 1], kinds[c, 1], dim, values, value_bits, PAGE_TOKENS * dim)
                for g in range(groups):
                    count = _places(bits[own + g * pages + i], dim, places)
                    target = (rows[q] * heads + h * groups + g) * dim
                    add_rows(weights, at[g], values, places, count, flat_total, size(target), size(dim))
                    at[g] += count
        at_query += heads * each


@compiled
def unite_rows(bits, starts, chunks, staged, numbers, union):  # type: ignore[no-untyped-def]
    """Find all rows of V that Q queries chose in staged pages.

    Args:
        bits: See `choose_keys`.
        starts: ``[Q + 1]``, likewise.
        chunks: See `attend_chosen`.
        staged: bool ``[C, 4]``: which pages are staged.
        numbers: ``[C, 4]``: the number of each.
        union: uint32 ``[staged pages, H_kv]``: bit t becomes 1 where a query reads the row of token t.
    """
    num_kv, heads = union.shape[1], len(bits) * PAGE_TOKENS // starts[-1]
    for q in range(len(starts) - 1):
        pages = (starts[q + 1] - starts[q]) // PAGE_TOKENS
        for i in range(pages):
            c, p = chunks[starts[q] // CHUNK_TOKENS + i // CHUNK_PAGES], i % CHUNK_PAGES
            if staged[c, p]:
                for j in range(heads):
                    found = bits[heads * (starts[q] // PAGE_TOKENS) + j * pages + i]
                    union[numbers[c, p], j * num_kv // heads] |= found

"""The kernel: queries of one sequence, for all heads that share a K/V head, pass over the sequence's pages.

The softmax is that of FlashAttention (Dao 2022, arXiv 2205.14135, algorithm 1) over pages of 32 keys in order of position.
What a query gets depends on its own keys, its place in the tile and the tile's shape only: hidden keys add exact zeros.
"""

# Triton's language has no types, and a kernel is one function.
# mypy: ignore-errors
# ruff: noqa: PLR0913, PLR0915

from __future__ import annotations

import triton
import triton.language as tl

from flexgen_helm.attention.paged import plan
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, PAGE_TOKENS
from flexgen_helm.kv_cache.token_rows import GROUP

PAGE, CHUNK, GROUP_SIZE = tl.constexpr(PAGE_TOKENS), tl.constexpr(CHUNK_TOKENS), tl.constexpr(GROUP)
CAUSAL, MASKED = tl.constexpr(plan.CAUSAL), tl.constexpr(plan.MASKED)
STAGED = tl.constexpr(plan.PLACES.index("staged"))


@triton.jit
def _tanh(x):
    """In fp32 without a library, as tanhf of Cephes (Moshier): a polynomial where a difference from 1 would lose digits."""
    z = x * x
    near = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z - 3.33332819422e-1
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, x + x * z * near, tl.where(x < 0, -far, far))


@triton.jit
def _base(place, first, second, third):
    return tl.where(place == 0, first, tl.where(place == 1, second, third))


@triton.jit
def _codes(begin, bit, BITS: tl.constexpr, mask):
    """Codes of some bits each, of which the first bits are at ``bit`` behind ``begin``."""
    packed = tl.load(begin + bit // 8, mask=mask, other=0).to(tl.int32)
    return ((packed >> (bit % 8)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _plain(base, head, j, d, dim, mask, DTYPE: tl.constexpr):
    """Elements ``d`` of tokens ``j`` of one head of a plain page."""
    stored = base.to(tl.pointer_type(DTYPE)) + head * PAGE * dim
    return tl.load(stored + j * dim + d, mask=mask, other=0.0)


@triton.jit
def _per_channel(base, head, j, d, dim, mask, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The same of sealed K, see `flexgen_helm.kv_cache.sealed_format.PerChannelPart`."""
    stored = base.to(tl.pointer_type(tl.uint8)) + head * dim * (4 + PAGE * BITS // 8)
    numbers = stored.to(tl.pointer_type(tl.bfloat16))
    scale = tl.load(numbers + 2 * d, mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(numbers + 2 * d + 1, mask=mask, other=0.0).to(tl.float32)
    codes = _codes(stored + 4 * dim, (d * PAGE + j) * BITS, BITS, mask)
    return (codes * scale + zero).to(DTYPE)


@triton.jit
def _per_token(base, head, j, d, dim, mask, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The same of sealed V, see `flexgen_helm.kv_cache.token_rows.TokenRow`."""
    codes_at = (dim + GROUP_SIZE - 1) // GROUP_SIZE * 4
    row_bytes = (codes_at * 8 + dim * BITS + 15) // 16 * 2
    stored = base.to(tl.pointer_type(tl.uint8)) + (head * PAGE + j) * row_bytes
    numbers = stored.to(tl.pointer_type(tl.bfloat16))
    scale = tl.load(numbers + 2 * (d // GROUP_SIZE), mask=mask, other=0.0).to(tl.float32)
    zero = tl.load(numbers + 2 * (d // GROUP_SIZE) + 1, mask=mask, other=0.0).to(tl.float32)
    codes = _codes(stored + codes_at, d * BITS, BITS, mask)
    return (codes * scale + zero).to(DTYPE)


@triton.jit
def _keys(base, head, j, d, mask, DIM: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Keys ``[WIDE, 32]`` of one head of a page."""
    if BITS == 16:
        return _plain(base, head, j[None, :], d[:, None], DIM, mask, DTYPE)
    else:
        return _per_channel(base, head, j[None, :], d[:, None], DIM, mask, BITS, DTYPE)


@triton.jit
def _values(base, head, j, d, mask, DIM: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Values ``[32, WIDE_V]`` of one head of a page."""
    if BITS == 16:
        return _plain(base, head, j[:, None], d[None, :], DIM, mask, DTYPE)
    else:
        return _per_token(base, head, j[:, None], d[None, :], DIM, mask, BITS, DTYPE)


@triton.jit
def _add_page(top, den, total, scores, values, DTYPE: tl.constexpr):
    """Add a page to the online softmax; -inf hides a key."""
    higher = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    rescale, weights = tl.exp(top - shift), tl.exp(scores - shift[:, None])
    total = total * rescale[:, None] + tl.dot(weights.to(DTYPE), values, input_precision="ieee")
    return higher, den * rescale + tl.sum(weights, 1), total


@triton.jit
def attend_tiles(
    queries,
    outputs,
    sinks,
    tiles,
    visits,
    masks,
    exact_slots,
    sealed_slots,
    exact_k0,
    exact_k1,
    exact_k2,
    exact_v0,
    exact_v1,
    exact_v2,
    sealed_k0,
    sealed_k1,
    sealed_k2,
    sealed_v0,
    sealed_v1,
    sealed_v2,
    k_bytes,
    v_bytes,
    sealed_k_bytes,
    sealed_v_bytes,
    scale,
    softcap,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_SEALED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Attend with one tile to the pages of one K/V head.

    Queries are ``[T, HEADS, DIM]``, outputs ``[T, HEADS, DIM_V]``, tables those of `flexgen_helm.attention.paged.plan`. The
    tensors of pages come as addresses: K and V of each form at three places, with the bytes of a page; 0 where there are none.
    """
    tile, head = tiles + 5 * tl.program_id(0), tl.program_id(1)
    first, low, high, place_in_chunk = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    row = tl.arange(0, ROWS)
    query, q_head = row // SHARING, head * SHARING + row % SHARING
    real = (query >= low) & (query < high)
    place_of_head = (first + query) * HEADS + q_head
    d, dv, j = tl.arange(0, WIDE), tl.arange(0, WIDE_V), tl.arange(0, PAGE)
    q_mask, k_mask = real[:, None] & (d < DIM)[None, :], (d < DIM)[:, None] & (j >= 0)[None, :]
    v_mask = (j >= 0)[:, None] & (dv < DIM_V)[None, :]
    q = tl.load(queries + place_of_head[:, None] * DIM + d[None, :], mask=q_mask, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    den = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDE_V], tl.float32)
    for v in range(tl.load(tile + 4), tl.load(tile + 9)):
        visit = visits + 10 * v
        kind, sealed = tl.load(visit), tl.load(visit + 1)
        last = tl.where(kind == CAUSAL, (place_in_chunk + high - 1) // PAGE, 3)
        for p in range(0, last + 1):
            place, number = tl.load(visit + 2 + p), tl.load(visit + 6 + p).to(tl.int64)
            if HAS_SEALED and sealed != 0:
                number = tl.load(sealed_slots + number, mask=place == STAGED, other=number)
                k_base = _base(place, sealed_k0, sealed_k1, sealed_k2) + number * sealed_k_bytes
                v_base = _base(place, sealed_v0, sealed_v1, sealed_v2) + number * sealed_v_bytes
                k = _keys(k_base, head, j, d, k_mask, DIM, K_BITS, DTYPE)
                values = _values(v_base, head, j, dv, v_mask, DIM_V, V_BITS, DTYPE)
            else:
                number = tl.load(exact_slots + number, mask=place == STAGED, other=number)
                k_base = _base(place, exact_k0, exact_k1, exact_k2) + number * k_bytes
                v_base = _base(place, exact_v0, exact_v1, exact_v2) + number * v_bytes
                k = _keys(k_base, head, j, d, k_mask, DIM, 16, DTYPE)
                values = _values(v_base, head, j, dv, v_mask, DIM_V, 16, DTYPE)
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if HAS_SOFTCAP:
                scores = _tanh(scores / softcap) * softcap
            key = p * PAGE + j
            if kind == CAUSAL:
                scores = tl.where(key[None, :] <= (place_in_chunk + query)[:, None], scores, float("-inf"))
            elif kind >= MASKED:
                shown = masks + ((kind - MASKED).to(tl.int64) * SIZE + query)[:, None] * CHUNK + key[None, :]
                scores = tl.where(tl.load(shown, mask=real[:, None], other=0) != 0, scores, float("-inf"))
            top, den, total = _add_page(top, den, total, scores, values, DTYPE)
    den = tl.where(den == 0, 1.0, den)
    total = total / den[:, None]
    if HAS_SINKS:
        sink = tl.load(sinks + q_head, mask=real, other=0.0).to(tl.float32)
        total = total * (1 / (1 + tl.exp(sink - top) / den))[:, None]
    places = outputs + place_of_head[:, None] * DIM_V + dv[None, :]
    tl.store(places, total.to(outputs.dtype.element_ty), mask=real[:, None] & (dv < DIM_V)[None, :])

"""Attention of packed rows over pages against plain dense attention in float64."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.attention.decode import DecodeAttention
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row import AttendTiles, RowAttention
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PageCounts, PageStorage
from flexgen_helm.schedule.rows import Row, Segment

KEY = CacheKey(0, 0)
RowKind = Literal["prefill", "decode"]
QKV = tuple[Tensor, Tensor, Tensor]
CAUSAL = MaskRule(lambda q, k: k <= q, True)
RULES = {
    "causal": CAUSAL,
    "sliding": MaskRule(lambda q, k: (k <= q) & (k > q - 40), False),
    "chunked": MaskRule(lambda q, k: (k <= q) & (k // 64 == q // 64), False),
}


@dataclass(frozen=True)
class Heads:
    """Query heads, K/V heads, head size of Q and K, head size of V."""

    q: int
    kv: int
    dim: int
    dim_v: int


@dataclass(frozen=True)
class Options:
    """What the attention of a family adds."""

    rule: str = "causal"
    softcap: float | None = None
    sinks: bool = False


def dense(q: Tensor, k: Tensor, v: Tensor, options: Options, sinks: Tensor | None) -> Tensor:
    """Plain attention of one sequence, ``[T, heads, dim]``, in float64."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    positions = torch.arange(len(q))
    seen = RULES[options.rule].allowed(positions[:, None], positions[None])
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.double().view(-1, 1, 1).expand(-1, len(q), 1)
        return torch.einsum("hqk,khd->qhd", torch.cat([scores, column], -1).softmax(-1)[..., :-1], v)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def num_shared(lengths: list[int], prefix: int) -> int:
    """Whole pages of the prefix, which are the first sequence's; every sequence keeps a token of its own."""
    return min(prefix, *(n - 1 for n in lengths)) // PAGE_TOKENS


class Machine:
    """Runs sequences through rows, piece by piece."""

    def __init__(
        self, heads: Heads, options: Options, lengths: list[int], prefix: int, cache_format: CacheFormat = PLAIN_CACHE
    ) -> None:
        chance = torch.Generator().manual_seed(sum(lengths))
        self.options, self.cache, self.heads = options, PagedCache(cache_format=cache_format), heads
        self.seals = cache_format.seals
        self.decode: DecodeAttention | None = DecodeAttention()
        """Attends for decode rows; None: their attention is computed call by call, as on a GPU."""
        self.attend_tiles: AttendTiles | None = None
        """The kernel for GPUs; None: it is not used."""
        self.sinks = torch.randn(heads.q, generator=chance) if options.sinks else None
        shapes = ((heads.q, heads.dim), (heads.kv, heads.dim), (heads.kv, heads.dim_v))
        self.inputs: list[QKV] = []
        for n in lengths:
            q, k, v = (torch.randn(n, *shape, generator=chance) for shape in shapes)
            self.inputs.append((q, k, v))
        common = min(prefix, *lengths)
        for other in self.inputs[1:]:
            for mine, first in zip(other, self.inputs[0], strict=True):
                mine[:common] = first[:common]
        self.shared = shared = num_shared(lengths, prefix)
        self.tables: list[list[int]] = []
        next_page = 0
        for i, n in enumerate(lengths):
            own = -(-n // PAGE_TOKENS) - (shared if i else 0)
            self.tables.append((self.tables[0][:shared] if i else []) + list(range(next_page, next_page + own)))
            next_page += own
        storage = PageStorage(PageCounts(next_page))
        self.cache.reserve({"exact": storage, "sealed": storage})
        self.outputs = [torch.zeros(n, heads.q, heads.dim_v) for n in lengths]

    def run(self, kind: RowKind, size: int, pieces: list[tuple[int, int, int]]) -> None:
        tables = [(table, table if self.seals else None) for table in self.tables]
        segments = [Segment((0,) * (b - a), a, tables[i][0], exact=tables[i][1]) for i, a, b in pieces]
        pages, decode = RowPages(Row(kind, size, segments), self.cache.page_maps), self.decode if kind == "decode" else None
        row = RowAttention(pages, self.cache, torch.device("cpu"), decode, attend_tiles=self.attend_tiles)
        parts = [torch.cat([self.inputs[i][x][a:b] for i, a, b in pieces]) for x in range(3)]
        q, k, v = (torch.cat([part, torch.zeros(size - len(part), *part.shape[1:])]) for part in parts)
        scale = self.heads.dim**-0.5
        out = row.attend(KEY, (q, k, v), RULES[self.options.rule], scale=scale, softcap=self.options.softcap, sinks=self.sinks)
        assert torch.isfinite(out).all()
        offset = 0
        for i, a, b in pieces:
            self.outputs[i][a:b] = out[offset : offset + b - a]
            offset += b - a

    def worst(self) -> float:
        begins = [0] + [self.shared * PAGE_TOKENS] * (len(self.inputs) - 1)
        expected = [dense(*inputs, self.options, self.sinks) for inputs in self.inputs]
        return max(float((x - y)[a:].abs().max()) for x, y, a in zip(expected, self.outputs, begins, strict=True))


def random_rows(lengths: list[int], prefix: int, seed: int) -> list[tuple[RowKind, int, list[tuple[int, int, int]]]]:
    """Rows of random pieces; the first sequence's prefix before all, the last token of some in decode rows."""
    chance = random.Random(seed)
    rows: list[tuple[RowKind, int, list[tuple[int, int, int]]]] = []
    shared = num_shared(lengths, prefix) * PAGE_TOKENS
    at = [0] + [shared] * (len(lengths) - 1)
    pending = [i for i in range(len(lengths)) if at[i] < lengths[i]]
    while pending:
        only_first = len(lengths) > 1 and at[0] < shared
        free, pieces = 64, []
        for i in [0] if only_first else chance.sample(pending, len(pending)):
            count = min(free, lengths[i] - at[i], chance.randint(1, 64))
            if count > 0:
                pieces.append((i, at[i], at[i] + count))
                at[i], free = at[i] + count, free - count
        decode = all(b - a == 1 for _, a, b in pieces) and len(pieces) <= 16
        rows.append(("decode", 16, pieces) if decode else ("prefill", 64, pieces))
        pending = [i for i in pending if at[i] < lengths[i]]
    return rows


HEADS = st.sampled_from(
    [Heads(4, 4, 16, 16), Heads(6, 2, 16, 16), Heads(3, 1, 32, 32), Heads(4, 4, 24, 16), Heads(2, 2, 16, 24)]
)
OPTIONS = st.builds(Options, st.sampled_from(sorted(RULES)), st.sampled_from([None, 20.0]), st.booleans())


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    HEADS,
    OPTIONS,
    st.lists(st.integers(1, 600), min_size=1, max_size=5),
    st.sampled_from([0, 40, 300]),
    st.integers(0, 9),
    st.booleans(),
)
def test_rows_equal_dense_attention(
    heads: Heads, options: Options, lengths: list[int], prefix: int, seed: int, in_calls: bool
) -> None:
    machine = Machine(heads, options, lengths, prefix)
    if in_calls:
        machine.decode = None
    for row in random_rows(lengths, prefix, seed):
        machine.run(*row)
    assert machine.worst() < 5e-6


@pytest.mark.parametrize("in_calls", [False, True])
@pytest.mark.parametrize("options", [Options(), Options("sliding"), Options(softcap=20.0), Options(sinks=True)], ids=str)
def test_decode_behind_a_shared_prefix_has_the_bits_of_decode_alone(options: Options, in_calls: bool) -> None:
    lengths = [700, 650, 690, 610]
    alone = []
    for i, n in enumerate(lengths):
        machine = Machine(Heads(9, 3, 64, 64), options, lengths, 600)
        if in_calls:
            machine.decode = None
        for k, m in enumerate(lengths):
            for a in range(0 if k == 0 else 576, m, 64):
                machine.run("prefill", 64, [(k, a, min(m, a + 64))])
        machine.run("decode", 16, [(i, n - 1, n)])
        alone.append(machine.outputs[i][-1])
        if i == len(lengths) - 1:
            machine.run("decode", 16, [(k, m - 1, m) for k, m in enumerate(lengths)])
            together = [output[-1] for output in machine.outputs]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_pages_parted_in_one_row_are_copied_before_they_are_read() -> None:
    """A prefix, a branch of it and a branch of the branch in one row: the copies of copies come from the tokens themselves."""
    heads, options = Heads(2, 2, 16, 16), Options()
    machine = Machine(heads, options, [10, 14, 18], 0)
    base = machine.inputs
    for mine, above, length in ((base[1], base[0], 10), (base[2], base[1], 14)):
        for x, y in zip(mine, above, strict=True):
            x[:length] = y[:length]
    tables = [[0], [1], [2]]
    segments = [
        Segment((0,) * 10, 0, tables[0]),
        Segment((0,) * 4, 10, tables[1], (0, 1, 10)),
        Segment((0,) * 4, 14, tables[2], (1, 2, 14)),
    ]
    row = RowAttention(RowPages(Row("prefill", 32, segments), machine.cache.page_maps), machine.cache, torch.device("cpu"))
    bounds = [(0, 0, 10), (1, 10, 14), (2, 14, 18)]
    q, k, v = (torch.cat([*(base[i][x][a:b] for i, a, b in bounds), torch.zeros(14, 2, 16)]) for x in range(3))
    out = row.attend(KEY, (q, k, v), CAUSAL, scale=0.25, softcap=None, sinks=None)
    offset = 0
    for i, a, b in bounds:
        expected = dense(*base[i], options, None)[a:b]
        assert (expected - out[offset : offset + b - a]).abs().max() < 5e-6
        offset += b - a

"""Which queries of a row meet which chunk of keys (DESIGN "Attention works in fixed splits").

Keys come in chunks of 256 by absolute position. A chunk that several sequences share is met once, by all their queries
together; a query's own, last chunk is met alone. A plan is made once per row and mask rule and used by every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_helm.attention.kernels import NEG_INF
from flexgen_helm.memory.pages import PAGE_TOKENS
from flexgen_helm.schedule.rows import Row, Segment

CHUNK_TOKENS = 256
QUERY_PAD = 16
CHUNK_PAGES = CHUNK_TOKENS // PAGE_TOKENS


@dataclass(frozen=True)
class MaskRule:
    """The model's own mask, as a predicate over positions."""

    allowed: Callable[[Tensor, Tensor], Tensor]
    """(query positions ``[M, 1]``, key positions ``[1, L]``) -> bool ``[M, L]``."""
    causal_only: bool
    """Whether it is plain causality, so that chunks before a query's own are seen whole."""


@dataclass
class ChunkCall:
    """One kernel call: some queries of the row over one chunk (stacked), or one query each over B chunks (batched)."""

    pages: Tensor
    """``[B * n]`` page numbers, B runs of n pages."""
    num_runs: int
    kept: bool
    queries: Tensor
    """``[M]`` positions in the row, padded to a multiple of 16 (stacked), or ``[B]`` (batched)."""
    first: int
    """Where the real queries begin within ``queries``."""
    num_queries: int
    batched: bool
    mask: Tensor | None
    """Additive: ``[1, 1, M, L]`` (stacked) or ``[B, 1, 1, L]`` (batched)."""
    dead: Tensor | None
    """``[num_queries]`` bool: real queries to which the mask shows nothing of this chunk."""


@dataclass
class AttentionPlan:
    """All calls of a row, and which of their outputs belong to which query."""

    calls: list[ChunkCall] = field(default_factory=list)
    num_outputs: int = 0
    order: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """``[R, T]`` for `merge_chunks`; ``num_outputs`` is an output that is nowhere, ``num_outputs + 1`` one that is zero."""


class _Visit(NamedTuple):
    """Queries ``[first, last)`` by absolute position of the segment that begins at ``offset`` in the row, over one chunk."""

    segment: Segment
    offset: int
    chunk: int
    first: int
    last: int
    pages: tuple[int, ...]

    @property
    def row_range(self) -> range:
        return range(self.offset + self.first - self.segment.start, self.offset + self.last - self.segment.start)


def plan_attention(row: Row, rule: MaskRule, *, full_keys: bool, dtype: torch.dtype, device: torch.device) -> AttentionPlan:
    """Plan a row's attention.

    Args:
        row: The row; its padding attends to nothing.
        rule: Mask of the layers that will use this plan.
        full_keys: Always give the kernel 256 keys (the product by hand is stable only in that shape).
        dtype: Of the queries.
        device: Where masks and indices go.
    """
    return _Planner(row, rule, full_keys, dtype, device).plan()


class _Planner:
    def __init__(self, row: Row, rule: MaskRule, full_keys: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.row, self.rule, self.full_keys, self.dtype, self.device = row, rule, full_keys, dtype, device
        self.result = AttentionPlan()
        self.outputs: list[list[tuple[int, int]]] = [[] for _ in range(row.size)]

    def plan(self) -> AttentionPlan:
        shared: dict[tuple[bool, int, tuple[int, ...]], list[_Visit]] = defaultdict(list)
        own: list[_Visit] = []
        for visit, is_own in self._visits():
            if is_own:
                own.append(visit)
            else:
                shared[visit.segment.kept, visit.chunk, visit.pages].append(visit)
        single: dict[tuple[bool, int], list[_Visit]] = defaultdict(list)
        decode = self.row.kind == "decode"
        for group in shared.values():
            if decode and len(group) == 1:
                single[group[0].segment.kept, CHUNK_PAGES].append(group[0])
            else:
                self._stacked(group)
        for visit in own:
            if decode:
                single[visit.segment.kept, len(visit.pages)].append(visit)
            else:
                self._stacked([visit])
        for visits in single.values():
            self._batched(visits)
        self.result.order = self._order()
        return self.result

    def _visits(self) -> Iterator[tuple[_Visit, bool]]:
        offset = 0
        for segment in self.row.segments:
            for chunk in range((segment.end - 1) // CHUNK_TOKENS + 1):
                low, high = chunk * CHUNK_TOKENS, (chunk + 1) * CHUNK_TOKENS
                table = segment.table[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES]
                if segment.end > high:
                    yield _Visit(segment, offset, chunk, max(segment.start, high), segment.end, tuple(table)), False
                first, last = max(segment.start, low), min(segment.end, high)
                if first < last:
                    pages = table[: -(-(last - low) // PAGE_TOKENS)]
                    if self.full_keys:
                        pages = pages + pages[-1:] * (CHUNK_PAGES - len(pages))
                    yield _Visit(segment, offset, chunk, first, last, tuple(pages)), True
            offset += len(segment.tokens)

    def _allowed(self, positions: list[int], visit: _Visit) -> Tensor:
        q = torch.tensor(positions, device=self.device)[:, None]
        k = torch.arange(len(visit.pages) * PAGE_TOKENS, device=self.device)[None] + visit.chunk * CHUNK_TOKENS
        return self.rule.allowed(q, k) & (k <= q)

    def _stacked(self, group: list[_Visit]) -> None:
        rows = [t for visit in group for t in visit.row_range]
        positions = [p for visit in group for p in range(visit.first, visit.last)]
        queries, first = _padded(rows, self.row.size)
        mask = dead = None
        if not (self.rule.causal_only and group[0].last > (group[0].chunk + 1) * CHUNK_TOKENS):
            allowed = self._allowed(positions, group[0])
            seen = allowed.any(-1)
            if not bool(seen.any()):
                return
            dead = None if bool(seen.all()) else ~seen
            full = torch.ones(len(queries), allowed.shape[1], dtype=torch.bool, device=self.device)
            full[first : first + len(rows)] = allowed | ~seen[:, None]
            mask = self._additive(full)[None, None]
        self._add(group[0], rows, 1, list(group[0].pages), (queries, first, mask, dead), batched=False)

    def _batched(self, visits: list[_Visit]) -> None:
        allowed = [self._allowed([visit.first], visit)[0] for visit in visits]
        alive = [(visit, row) for visit, row in zip(visits, allowed, strict=True) if bool(row.any())]
        if not alive:
            return
        rows = [visit.row_range[0] for visit, _ in alive]
        mask = self._additive(torch.stack([row for _, row in alive]))[:, None, None]
        pages = [page for visit, _ in alive for page in visit.pages]
        self._add(
            alive[0][0],
            rows,
            len(alive),
            pages,
            (rows, 0, mask, None),
            batched=True,
            chunks=[v.chunk for v, _ in alive],
        )

    def _add(
        self,
        visit: _Visit,
        rows: list[int],
        num_runs: int,
        pages: list[int],
        shape: tuple[list[int], int, Tensor | None, Tensor | None],
        *,
        batched: bool,
        chunks: list[int] | None = None,
    ) -> None:
        queries, first, mask, dead = shape
        indices = [torch.tensor(x, device=self.device) for x in (pages, queries)]
        call = ChunkCall(indices[0], num_runs, visit.segment.kept, indices[1], first, len(rows), batched, mask, dead)
        self.result.calls.append(call)
        for i, t in enumerate(rows):
            self.outputs[t].append((chunks[i] if chunks else visit.chunk, self.result.num_outputs + i))
        self.result.num_outputs += len(rows)

    def _additive(self, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, NEG_INF)

    def _order(self) -> Tensor:
        nowhere, zero = self.result.num_outputs, self.result.num_outputs + 1
        ranks = max(1, max(len(found) for found in self.outputs))
        table = [[index for _, index in sorted(found)] or [zero] for found in self.outputs]
        return torch.tensor([found + [nowhere] * (ranks - len(found)) for found in table], device=self.device).T.contiguous()


def _padded(rows: list[int], size: int) -> tuple[list[int], int]:
    """Pad query rows to a multiple of 16, by their neighbours where they are consecutive; the second is where they begin."""
    count = -(-len(rows) // QUERY_PAD) * QUERY_PAD
    if rows[-1] - rows[0] == len(rows) - 1 and count <= size:
        start = min(rows[0], size - count)
        return list(range(start, start + count)), rows[0] - start
    return rows + rows[:1] * (count - len(rows)), 0

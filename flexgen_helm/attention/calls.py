"""Which queries of a row meet which chunk of keys (docs/architecture.md "Attention in fixed splits").

Keys come in chunks of 128 by absolute position, and a kernel always gets a whole one: what a chunk does not hold yet is masked.
A product over fewer keys is cheaper and gives other bits (measured, see runs/LOG.md). A chunk that several sequences share is
met once, by all their queries together. A plan is made once per row and mask rule and used by every layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from flexgen_helm.attention.kernels import NEG_INF
from flexgen_helm.attention.row_pages import CHUNK_PAGES, CHUNK_TOKENS, RowPages, segment_table
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.memory.pages import Place
from flexgen_helm.schedule.rows import Segment

WINDOW_CHUNKS = 4
"""Chunks of keys whose outputs are held until they are merged; chunks of other windows never meet in one call."""
QUERY_PAD = 16
OWN_QUERIES = (16, 32, 64, 96, 128)
"""Numbers of queries to which those of a sequence's last chunk are padded."""


@dataclass(frozen=True)
class MaskRule:
    """The model's own mask, as a predicate over positions."""

    allowed: Callable[[Tensor, Tensor], Tensor]
    """(query positions ``[M, 1]``, key positions ``[M, L]`` or ``[1, L]``) -> bool ``[M, L]``."""
    causal_only: bool
    """Whether it is plain causality, so that chunks before a query's own are seen whole."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse()

    def __radd__(self, other: object) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedModel("it uses the attention mask as a tensor; packed rows have none")


Index = slice | Tensor
"""Consecutive rows as a slice, which costs no copy, others as ``[n]`` indices."""


def as_index(values: list[int], device: torch.device) -> Index:
    """The shortest form of an index."""
    if values == list(range(values[0], values[0] + len(values))):
        return slice(values[0], values[0] + len(values))
    return torch.tensor(values, device=device)


class PagePart(NamedTuple):
    """Those pages of a call that are at one place."""

    place: Place
    numbers: Tensor
    """Of the pages among those of the place."""
    which: Tensor | None
    """Which of the call's pages they are, four to a chunk; None: all, in order."""


@dataclass(eq=False)
class ChunkCall:
    """One kernel call over B chunks: M queries each, those of several sequences among them, or one query each (single)."""

    pages: list[PagePart]
    num_chunks: int
    queries: Index
    """Positions in the row: B * M, padded, or B (single)."""
    real: Index
    """Which of ``queries`` are not padding."""
    single: bool
    mask: Tensor | None
    """Additive: ``[B, 1, M, L]`` or ``[B, 1, 1, L]`` (single)."""
    dead: Tensor | None
    """Bool for each real query: those to which the mask shows nothing of this chunk."""
    outputs: Index = field(default_factory=lambda: slice(0))
    """Where the outputs go: row t of the window's r-th chunk is at r * T + t."""

    @property
    def is_on_host(self) -> bool:
        """Whether all its pages are on the host."""
        return all(part.place == "host" for part in self.pages)

    def moved_to(self, device: torch.device) -> ChunkCall:
        """The same call, computed elsewhere; its answers are put where they belong as before."""
        queries, real = (x if isinstance(x, slice) else x.to(device) for x in (self.queries, self.real))
        mask = None if self.mask is None else self.mask.to(device)
        pages = [part._replace(numbers=part.numbers.to(device)) for part in self.pages]
        return replace(self, pages=pages, queries=queries, real=real, mask=mask)


@dataclass
class Window:
    """All calls of a row over a few consecutive chunks."""

    calls: list[ChunkCall]
    host_calls: list[ChunkCall]
    """Those that are computed on the CPU, beside the others."""
    num_chunks: int
    absent: Tensor
    """Where no call writes, see `ChunkCall.outputs`: queries that do not meet every chunk."""


class _Visit(NamedTuple):
    """Queries ``[first, last)`` by absolute position of the segment that begins at ``offset`` in the row, over one chunk."""

    segment: Segment
    offset: int
    chunk: int
    first: int
    last: int
    pages: tuple[int, ...]

    @property
    def num_queries(self) -> int:
        return self.last - self.first

    @property
    def row_range(self) -> range:
        return range(self.offset + self.first - self.segment.start, self.offset + self.last - self.segment.start)


def plan_attention(pages: RowPages, rule: MaskRule, *, dtype: torch.dtype, device: torch.device) -> list[Window]:
    """Plan a row's attention, in windows in order of position, of which there is at least one.

    Args:
        pages: The row and its pages. Padding of the row attends to nothing.
        rule: Mask of the layers that will use this plan.
        dtype: Of the queries.
        device: Where masks and indices go.
    """
    return _Planner(pages, rule, dtype, device).plan()


class _Planner:
    def __init__(self, pages: RowPages, rule: MaskRule, dtype: torch.dtype, device: torch.device) -> None:
        self.row, self.pages, self.rule, self.dtype, self.device = pages.row, pages, rule, dtype, device
        self.calls: list[ChunkCall] = []
        self.met: list[list[tuple[int, int]]] = []
        """For each call, the position in the row and the chunk of each real query."""

    def plan(self) -> list[Window]:
        """Sort the visits of each window into as few kernel calls as possible."""
        by_window: dict[int, list[tuple[_Visit, bool]]] = defaultdict(list)
        for visit, is_own in self._visits():
            by_window[visit.chunk // WINDOW_CHUNKS].append((visit, is_own))
        windows = [self._window(by_window[i]) for i in sorted(by_window)]
        return [window for window in windows if window.calls or window.host_calls] or windows[:1]

    def _window(self, visits: list[tuple[_Visit, bool]]) -> Window:
        self.calls, self.met = [], []
        together: dict[tuple[bool, int, tuple[int, ...]], list[_Visit]] = {}
        own: list[_Visit] = []
        for visit, is_own in visits:
            if is_own:
                own.append(visit)
            else:
                together.setdefault((visit.segment.kept, visit.chunk, visit.pages), []).append(visit)
        if self.row.kind == "decode":
            self._singles([group[0] for group in together.values() if len(group) == 1] + own)
            together = {key: group for key, group in together.items() if len(group) > 1}
        else:
            self._own_chunks(own)
        for group in together.values():
            self._stacked([group], -(-sum(visit.num_queries for visit in group) // QUERY_PAD) * QUERY_PAD)
        return self._placed()

    def _visits(self) -> Iterator[tuple[_Visit, bool]]:
        offset = 0
        for segment in self.row.segments:
            table = segment_table(segment)
            for chunk in range((segment.end - 1) // CHUNK_TOKENS + 1):
                low, high = chunk * CHUNK_TOKENS, (chunk + 1) * CHUNK_TOKENS
                found = table[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES]
                pages = tuple(found + found[-1:] * (CHUNK_PAGES - len(found)))
                if segment.end > high:
                    yield _Visit(segment, offset, chunk, max(segment.start, high), segment.end, pages), False
                first, last = max(segment.start, low), min(segment.end, high)
                if first < last:
                    yield _Visit(segment, offset, chunk, first, last, pages), True
            offset += len(segment.tokens)

    def _own_chunks(self, visits: list[_Visit]) -> None:
        """Each sequence's last chunk: as many as possible in one call, padded to one of a few numbers of queries."""
        buckets: dict[tuple[frozenset[Place], int], list[list[_Visit]]] = defaultdict(list)
        for visit in visits:
            size = next(size for size in OWN_QUERIES if size >= visit.num_queries)
            buckets[self._places(visit), size].append([visit])
        for (_, size), groups in buckets.items():
            self._stacked(groups, size)

    def _stacked(self, groups: list[list[_Visit]], size: int) -> None:
        """Each group's queries meet the chunk that they share; all groups in one call, padded to ``size`` queries."""
        queries: list[int] = []
        real: list[int] = []
        met: list[tuple[int, int]] = []
        for group in groups:
            rows = [t for visit in group for t in visit.row_range]
            padded, first = _padded(rows, size, self.row.size)
            real += range(len(queries) + first, len(queries) + first + len(rows))
            queries += padded
            met += [(t, group[0].chunk) for t in rows]
        mask = dead = None
        first_visit = groups[0][0]
        if not (self.rule.causal_only and first_visit.last > (first_visit.chunk + 1) * CHUNK_TOKENS):
            positions = [p for group in groups for visit in group for p in range(visit.first, visit.last)]
            allowed = self._allowed(positions, [chunk for _, chunk in met])
            seen = allowed.any(-1)
            if not bool(seen.any()):
                return
            dead = None if bool(seen.all()) else ~seen
            full = torch.ones(len(queries), CHUNK_TOKENS, dtype=torch.bool, device=self.device)
            full[self._index(real)] = allowed | ~seen[:, None]
            mask = self._additive(full).view(len(groups), 1, size, CHUNK_TOKENS)
        indices = (self._index(queries), self._index(real))
        self.calls.append(ChunkCall(self._parts([group[0] for group in groups]), len(groups), *indices, False, mask, dead))
        self.met.append(met)

    def _singles(self, visits: list[_Visit]) -> None:
        """Single queries meet a chunk each, all whose pages are at the same place in one call."""
        by_places: dict[frozenset[Place], list[_Visit]] = defaultdict(list)
        for visit in visits:
            by_places[self._places(visit)].append(visit)
        for group in by_places.values():
            self._single(group)

    def _single(self, visits: list[_Visit]) -> None:
        allowed = self._allowed([visit.first for visit in visits], [visit.chunk for visit in visits])
        seen = allowed.any(-1)
        visits = [visit for visit, alive in zip(visits, seen.tolist(), strict=True) if alive]
        if not visits:
            return
        rows = [visit.row_range[0] for visit in visits]
        mask = self._additive(allowed[seen])[:, None, None]
        self.calls.append(ChunkCall(self._parts(visits), len(visits), self._index(rows), slice(len(rows)), True, mask, None))
        self.met.append([(t, visit.chunk) for t, visit in zip(rows, visits, strict=True)])

    def _places(self, visit: _Visit) -> frozenset[Place]:
        return frozenset(self.pages.place(page, kept=visit.segment.kept) for page in visit.pages)

    def _parts(self, visits: list[_Visit]) -> list[PagePart]:
        """The pages of all visits' chunks, by their place."""
        by_place: dict[Place, list[tuple[int, int]]] = defaultdict(list)
        pages = [(page, visit.segment.kept) for visit in visits for page in visit.pages]
        for i, (page, kept) in enumerate(pages):
            place = self.pages.place(page, kept=kept)
            by_place[place].append((self.pages.index(page, place), i))
        return [
            PagePart(place, *torch.tensor(found, device=self.device).T)
            if len(by_place) > 1
            else PagePart(place, torch.tensor([index for index, _ in found], device=self.device), None)
            for place, found in by_place.items()
        ]

    def _allowed(self, positions: list[int], chunks: list[int]) -> Tensor:
        """Which keys of its chunk each query sees: ``[len(positions), 128]``."""
        q = torch.tensor(positions, device=self.device)[:, None]
        begin = CHUNK_TOKENS * torch.tensor(chunks, device=self.device)[:, None]
        k = torch.arange(CHUNK_TOKENS, device=self.device)[None] + begin
        return self.rule.allowed(q, k) & (k <= q)

    def _index(self, values: list[int]) -> Index:
        return as_index(values, self.device)

    def _additive(self, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, NEG_INF)

    def _placed(self) -> Window:
        """Give every call its places among the window's outputs."""
        num_chunks = max((chunk % WINDOW_CHUNKS + 1 for met in self.met for _, chunk in met), default=1)
        absent = torch.ones(num_chunks * self.row.size, dtype=torch.bool, device=self.device)
        for call, met in zip(self.calls, self.met, strict=True):
            call.outputs = self._index([chunk % WINDOW_CHUNKS * self.row.size + t for t, chunk in met])
            absent[call.outputs] = False
        away = [call for call in self.calls if self.pages.host_attends and call.is_on_host]
        here = [call for call in self.calls if call not in away]
        away = [call.moved_to(torch.device("cpu")) for call in away]
        return Window(here, away, num_chunks, absent.nonzero()[:, 0])


def _padded(rows: list[int], count: int, row_size: int) -> tuple[list[int], int]:
    """Pad query rows to ``count``, by their neighbours where they are consecutive; the second is where they begin."""
    if rows[-1] - rows[0] == len(rows) - 1 and count <= row_size:
        start = min(rows[0], row_size - count)
        return list(range(start, start + count)), rows[0] - start
    return rows + rows[:1] * (count - len(rows)), 0

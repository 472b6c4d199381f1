"""Kernel calls of a row's attention: the groups of `flexgen_helm.attention.visits` as tensors of indices, masks and pages.

A kernel always gets whole chunks of 128 keys: keys that a chunk does not hold yet are masked. A product over fewer keys is
cheaper and gives other bits (measured, see runs/LOG.md). Calls are planned once per row and mask rule, for all layers.

Five index spaces, in a prefill row of T = 32 tokens: A's positions 120 to 139, B's 0 to 9, two of padding. A window has the
outputs of R <= 4 chunks; here R = 2::

    row position t    0 ........ 7 | 8 ............ 19 | 20 ........ 29 | 30 31
    token             A120 .. A127 | A128 ...... A139  | B0 ........ B9 | padding
    chunk 0           own          | shared            | own            |
    chunk 1                        | own               |                |

    call of the own chunks, B = 3, M = 16 queries for each, padded by their neighbours in the row:
                            A, chunk 0      A, chunk 1      B, chunk 0
    padded query i    0 ............ 15 | 16 .......... 31 | 32 .......... 47    B * M
    queries[i] = t    0 ............ 15 | 8 ........... 23 | 16 .......... 31
    real query n      0 ..... 7         | 8 ...... 19      |    20 ... 29
    real[n] = i       0 ..... 7         | 16 ..... 27      |    36 ... 45
    outputs[n]        0 ..... 7         | 40 ..... 51      |    20 ... 29

    call of the shared chunk, B = 1: queries 8 to 23, real 0 to 11, outputs 8 to 19.

    window output     r * T + t is what the token at t gets from the window's r-th chunk; R * T of them
    absent            30 to 39, 52 to 63: no call writes there
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.attention.kernels import NEG_INF
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import Array, RowPages
from flexgen_helm.attention.visits import WINDOW_CHUNKS, Visit, VisitGroup, row_groups
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PAGE_TOKENS, Form, Place
from flexgen_helm.memory.copies import to_device, upload

Index = slice | Tensor
"""Indices ``[n]``; consecutive ones as a slice, which costs no copy."""


def as_index(values: list[int] | Array, device: torch.device) -> Index:
    """The shortest form of some indices."""
    found = np.array(values, np.int64)
    if (np.diff(found) == 1).all():
        return slice(int(found[0]), int(found[0]) + len(found))
    return to_device(torch.from_numpy(found), device)


class PlacedPages(NamedTuple):
    """Those pages of a call that are at one place, P of the call's 4 * B.

    Attributes:
        place: The place.
        numbers: ``[P]``: their numbers among the pages of the place.
        which: ``[P]``: which of the call's pages they are, four to a chunk. None: all of them, in order.
    """

    place: Place
    numbers: Tensor
    which: Tensor | None


@dataclass(frozen=True, eq=False)
class ChunkCall:
    """One kernel call over B chunks of L = 128 keys, with M queries for each; N of the B * M queries are real.

    Attributes:
        form: The form of the call's pages.
        pages: The pages, by their place.
        num_chunks: B.
        chunks: Numbers of the B chunks.
        queries: ``[B * M]``: the row position of each padded query.
        real: ``[N]``: which padded queries are no padding.
        single: Whether M is 1, so that the heads of a query are the rows of a product.
        mask: ``[B, 1, M, L]``, additive, of the queries' dtype. None: every key is seen.
        dead: ``[N]`` bool: the real queries to which the mask shows nothing of their chunk. None: there are none.
        outputs: ``[N]``: the window output r * T + t of each real query.
    """

    form: Form
    pages: list[PlacedPages]
    num_chunks: int
    chunks: tuple[int, ...]
    queries: Index
    real: Index
    single: bool
    mask: Tensor | None
    dead: Tensor | None
    outputs: Index

    @cached_property
    def chunk_numbers(self) -> Tensor:
        """``chunks`` on the device."""
        return upload(self.chunks, self.pages[0].numbers.device)

    def places(self, row_size: int, *, real: bool) -> tuple[Tensor, Tensor]:
        """Row position and chunk of each padded query, or of the real ones: ``[B * M]`` or ``[N]`` each."""
        t = torch.arange(row_size, device=self.chunk_numbers.device)[self.queries]
        c = self.chunk_numbers.repeat_interleave(len(t) // self.num_chunks)
        return (t[self.real], c[self.real]) if real else (t, c)

    def page_sums(self, x: Tensor, row_size: int) -> Tensor:
        """Sum numbers of keys over the queries that read them.

        Args:
            x: ``[T, C, H, 128]``: for each query of a row, chunk and head.
            row_size: T.

        Returns:
            ``[4 * B, H, 32]``, for each of the call's pages.
        """
        t, c = self.places(row_size, real=True)
        which = torch.arange(self.num_chunks, device=x.device).repeat_interleave(self.num_queries)[self.real]
        sums = x.new_zeros(self.num_chunks, *x.shape[2:]).index_add_(0, which, x[t, c])
        by_page: Tensor = sums.unflatten(-1, (CHUNK_PAGES, PAGE_TOKENS))
        return by_page.transpose(1, 2).flatten(0, 1)

    @property
    def num_queries(self) -> int:
        """M."""
        count = self.queries.stop - self.queries.start if isinstance(self.queries, slice) else len(self.queries)
        return int(count) // self.num_chunks


@dataclass(frozen=True)
class Window:
    """All calls of a row of T tokens over R <= 4 consecutive chunks.

    Attributes:
        calls: The calls.
        num_chunks: R.
        absent: The window outputs that no call writes, because a query does not attend to every chunk.
    """

    calls: list[ChunkCall]
    num_chunks: int
    absent: Tensor


def plan_attention(
    pages: RowPages, rule: MaskRule, *, dtype: torch.dtype, device: torch.device, own_token: bool = True
) -> list[Window]:
    """Plan a row's attention, in windows in order of position, of which there is at least one.

    Args:
        pages: The row and its pages. Padding of the row attends to nothing.
        rule: Mask of the layers that will use this plan.
        dtype: The dtype of the queries and of the masks.
        device: Where masks and indices go.
        own_token: Whether calls show a query its own token.
    """
    planner = _Planner(pages, rule, dtype, device, own_token=own_token)
    windows = [planner.window(groups) for groups in row_groups(pages)]
    return [window for window in windows if window.calls] or windows[:1]


class _Planned(NamedTuple):
    call: ChunkCall
    outputs: list[int]


class _Planner:
    """Makes tensors of groups of visits. No tensor is read back but whether a mask other than causality shows anything."""

    def __init__(self, pages: RowPages, rule: MaskRule, dtype: torch.dtype, device: torch.device, *, own_token: bool) -> None:
        self.pages, self.rule, self.dtype, self.device, self.own_token = pages, rule, dtype, device, own_token
        self.row_size = pages.row.size
        self._all_see = rule.causal_only and own_token
        """Whether every query sees a key of each chunk that it visits; else the mask must be looked at."""

    def window(self, groups: list[VisitGroup]) -> Window:
        """The calls of a window; groups to which the mask shows nothing are left out."""
        made = [self._single(group) if group.kind == "single" else self._stacked(group) for group in groups]
        planned = [x for x in made if x is not None]
        num_chunks = 1 + max((max(x.outputs) for x in planned), default=0) // self.row_size
        absent = torch.ones(num_chunks * self.row_size, dtype=torch.bool)  # on the host, which must know how many there are
        for _, outputs in planned:
            absent[outputs] = False
        return Window([call for call, _ in planned], num_chunks, to_device(absent.nonzero()[:, 0], self.device))

    def _stacked(self, group: VisitGroup) -> _Planned | None:
        """Own or shared chunks: for each chunk the queries of its visits, padded to as many for every chunk."""
        queries: list[int] = []
        real: list[int] = []
        outputs: list[int] = []
        for visits in group.chunks:
            rows = [t for visit in visits for t in visit.rows]
            padded, first = _padded(rows, group.num_queries, self.row_size)
            real += range(len(queries) + first, len(queries) + first + len(rows))
            queries += padded
            outputs += [self._output(visits[0].chunk, t) for t in rows]
        mask = dead = None
        if group.kind == "own" or not self.rule.causal_only:
            allowed = self._allowed([visit for visits in group.chunks for visit in visits])
            seen = allowed.any(-1)
            num_seen = len(seen) if self._all_see else int(seen.sum())
            if num_seen == 0:
                return None
            dead = None if num_seen == len(seen) else ~seen
            full = torch.ones(len(queries), CHUNK_TOKENS, dtype=torch.bool, device=self.device)
            full[self._index(real)] = allowed | ~seen[:, None]
            mask = self._additive(full).view(len(group.chunks), 1, group.num_queries, CHUNK_TOKENS)
        chunks = tuple(visits[0].chunk for visits in group.chunks)
        form, pages = self._placed([visits[0] for visits in group.chunks])
        indices = (self._index(queries), self._index(real))
        call = ChunkCall(form, pages, len(group.chunks), chunks, *indices, False, mask, dead, self._index(outputs))
        return _Planned(call, outputs)

    def _single(self, group: VisitGroup) -> _Planned | None:
        """One query for each chunk; those to which the mask shows nothing are left out."""
        visits = [visit for (visit,) in group.chunks]
        allowed = self._allowed(visits)
        if not self._all_see:
            seen = allowed.any(-1)
            visits = [visit for visit, alive in zip(visits, seen.tolist(), strict=True) if alive]
            allowed = allowed[seen]
        if not visits:
            return None
        rows = [visit.rows[0] for visit in visits]
        outputs = [self._output(visit.chunk, t) for visit, t in zip(visits, rows, strict=True)]
        mask = self._additive(allowed)[:, None, None]
        chunks = tuple(visit.chunk for visit in visits)
        indices = (self._index(rows), slice(len(rows)))
        call = ChunkCall(*self._placed(visits), len(visits), chunks, *indices, True, mask, None, self._index(outputs))
        return _Planned(call, outputs)

    def _output(self, chunk: int, t: int) -> int:
        """The window output of the token at row position t, from one chunk."""
        return chunk % WINDOW_CHUNKS * self.row_size + t

    def _placed(self, visits: list[Visit]) -> tuple[Form, list[PlacedPages]]:
        """The form of the visits, and the pages of all their chunks, by their place."""
        form = visits[0].form
        by_place: dict[Place, list[tuple[int, int]]] = defaultdict(list)
        for i, page in enumerate(page for visit in visits for page in visit.pages):
            place, index = self.pages.find(page, form)
            by_place[place].append((index, i))
        return form, [
            PlacedPages(place, *upload(found, self.device).T)
            if len(by_place) > 1
            else PlacedPages(place, upload([index for index, _ in found], self.device), None)
            for place, found in by_place.items()
        ]

    def _allowed(self, visits: list[Visit]) -> Tensor:
        """Which keys of its chunk each query of some visits sees: bool ``[queries, 128]``."""
        positions = [position for visit in visits for position in range(visit.first, visit.last)]
        begins = [CHUNK_TOKENS * visit.chunk for visit in visits for _ in range(visit.num_queries)]
        places = upload([positions, begins], self.device)[..., None]
        q, k = places[0], places[1] + torch.arange(CHUNK_TOKENS, device=self.device)
        return self.rule.allowed(q, k) & (k <= q if self.own_token else k < q)

    def _index(self, values: list[int]) -> Index:
        return as_index(values, self.device)

    def _additive(self, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, NEG_INF)


def _padded(rows: list[int], count: int, row_size: int) -> tuple[list[int], int]:
    """Pad row positions to ``count``, by their neighbours where they are consecutive; the second is where they begin."""
    if rows[-1] - rows[0] == len(rows) - 1 and count <= row_size:
        start = min(rows[0], row_size - count)
        return list(range(start, start + count)), rows[0] - start
    return rows + rows[:1] * (count - len(rows)), 0

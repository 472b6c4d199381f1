"""Which tiles of queries a row has, and which chunks each visits: tables for the kernel. Made once per row and mask rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import Array, RowPages, chunk_pages, counted, earlier_form, exact_table, located
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, Place
from flexgen_helm.memory.copies import to_device
from flexgen_helm.schedule.rows import Row

PLACES: tuple[Place, ...] = ("transient", "device", "staged")
"""Places of pages that a GPU reads, numbered as in the kernel."""
TILE_BYTES, MOST_QUERIES = 128, 64
"""Bytes of a column of a tile of prompts, queries times the heads that share a K/V head, and most queries. Twice as many spill
registers with heads of 128 and 256 (ptxas for sm_90a)."""
SEEN, CAUSAL, MASKED = range(3)
"""Kinds of visits: all keys are seen; those up to the query; number 2 + i: those of mask i."""
MASKED_AT_ONCE = 1 << 20
"""Pairs of a query and a key for which a model's mask is asked at a time: 8 MiB of positions."""


def tile_queries(kind: str, sharing: int, itemsize: int) -> int:
    """Return the queries M of a tile: 1 in decode rows; else positions ``[M * i, M * (i + 1))`` of a sequence, M divides 128.

    Args:
        kind: Kind of the row.
        sharing: Query heads that share a K/V head.
        itemsize: Bytes of an element of queries.
    """
    if kind == "decode":
        return 1
    fitting = max(1, TILE_BYTES // itemsize // sharing)
    return int(min(MOST_QUERIES, 1 << (fitting.bit_length() - 1)))


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Tables of a row's tiles.

    Attributes:
        size: M: queries of a tile, padding included.
        tiles: int32 ``[tiles + 1, 5]``: row position of the tile's first place, first real place, place behind the last real
            one, position of the first place within its chunk, first visit. The last line closes the visits.
        visits: int32 ``[visits, 10]``: kind, whether the chunk is read in its sealed form, place and number of its 4 pages.
        masks: uint8 ``[masks, M, 128]``: which keys of a chunk each query sees.
        nothing: int64 ``[1]``: stands for slots and sinks where there are none.
    """

    size: int
    tiles: Tensor
    visits: Tensor
    masks: Tensor
    nothing: Tensor

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return len(self.tiles) - 1

    @classmethod
    def of(cls, pages: RowPages, rule: MaskRule, size: int, device: torch.device) -> TilePlan:
        """Plan a row.

        Args:
            pages: The row and its pages.
            rule: Mask of the layers that will use this plan.
            size: Queries of a tile.
            device: Where the tables are.
        """
        tiles, chunks = _Tiles.of(pages.row, size), _Chunks.of(pages)
        # A tile lies in one chunk and visits the chunks up to it.
        counts = tiles.begins // CHUNK_TOKENS + 1
        owner, chunk = np.repeat(np.arange(len(counts)), counts), counted(counts)
        own = chunk == counts[owner] - 1
        read = chunks.lines[np.where(own, chunks.own[tiles.segments[owner]], chunks.earlier[tiles.segments[owner]]) + chunk]
        kinds = np.where(own, CAUSAL, SEEN)
        masks = torch.zeros(1, size, CHUNK_TOKENS, dtype=torch.uint8)
        if not rule.causal_only:
            seen, partly, found = _shown(tiles, owner, chunk, rule)
            masks = found if len(found) else masks
            kinds[partly] = MASKED + np.arange(len(found))
            kinds, read, owner = kinds[seen], read[seen], owner[seen]
        first = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(counts)))])
        closed = np.zeros((len(counts) + 1, 5), np.int32)
        closed[:-1, :4], closed[:, 4] = tiles.places, first
        visits = np.column_stack([kinds, read]) if len(kinds) else np.zeros((1, 10))
        lines, tables = (to_device(torch.from_numpy(x.astype(np.int32)), device) for x in (closed, visits))
        return cls(size, lines, tables, to_device(masks, device), torch.zeros(1, dtype=torch.long, device=device))


class _Tiles(NamedTuple):
    """T tiles of a row, sequence by sequence: each has the queries of one segment at positions ``[begin, begin + size)``.

    Attributes:
        size: Queries of a tile, padding included.
        segments: ``[T]``: the segment of the row.
        begins: ``[T]``: position of the first place, whether a query is there or not.
        lows: ``[T]``: position of the first real query.
        highs: ``[T]``: position behind the last one.
        rows: ``[T]``: row position of the first place.
    """

    size: int
    segments: Array
    begins: Array
    lows: Array
    highs: Array
    rows: Array

    @classmethod
    def of(cls, row: Row, size: int) -> _Tiles:
        """Cut the segments of a row."""
        starts, ends = (np.array([getattr(x, name) for x in row.segments], np.int64) for name in ("start", "end"))
        offsets = np.cumsum(ends - starts) - (ends - starts)
        counts = (ends - 1) // size - starts // size + 1
        segments = np.repeat(np.arange(len(counts)), counts)
        begins = (starts // size)[segments] * size + counted(counts) * size
        lows, highs = np.maximum(begins, starts[segments]), np.minimum(begins + size, ends[segments])
        return cls(size, segments, begins, lows, highs, (offsets - starts)[segments] + begins)

    @property
    def places(self) -> Array:
        """The tiles' lines of `TilePlan.tiles`, without their visits: ``[T, 4]``."""
        return np.column_stack([self.rows, self.lows - self.begins, self.highs - self.begins, self.begins % CHUNK_TOKENS])


class _Chunks(NamedTuple):
    """The chunks of a row's S segments.

    Attributes:
        lines: ``[chunks, 9]``: the lines of `TilePlan.visits` without the kind.
        earlier: ``[S]``: the line of a segment's chunk 0, as queries behind the chunk read it.
        own: ``[S]``: what added to the number of a chunk gives its line, as the queries in it read it.
    """

    lines: Array
    earlier: Array
    own: Array

    @classmethod
    def of(cls, pages: RowPages) -> _Chunks:
        """Find the pages of all chunks."""
        spots: list[int] = []
        sealed: list[bool] = []
        earlier: list[int] = []
        own: list[int] = []
        for segment in pages.row.segments:
            form, table = earlier_form(segment), exact_table(segment)
            first, last = segment.start // CHUNK_TOKENS, (segment.end - 1) // CHUNK_TOKENS
            earlier.append(len(sealed))
            spots += pages.spots((segment.table if form == "sealed" else table)[: last * CHUNK_PAGES], form)
            sealed += [form == "sealed"] * last
            own.append(len(sealed) - first)
            spots += pages.spots([page for chunk in range(first, last + 1) for page in chunk_pages(table, chunk)], "exact")
            sealed += [False] * (last - first + 1)
        found = (x.reshape(-1, CHUNK_PAGES) for x in located(spots, PLACES))
        return cls(np.column_stack([np.array(sealed, np.int64), *found]), np.array(earlier, np.int64), np.array(own, np.int64))


def _shown(tiles: _Tiles, owner: Array, chunk: Array, rule: MaskRule) -> tuple[Array, Array, Tensor]:
    """Ask a model's mask what V visits show.

    Args:
        tiles: The tiles.
        owner: ``[V]``: the tile of each visit.
        chunk: ``[V]``: its chunk.
        rule: The mask.

    Returns:
        Which visits show a query a key, bool ``[V]``; which of them show less than causality does, bool ``[V]``; and what
        those show, uint8 ``[masks, M, 128]``.
    """
    step = max(1, MASKED_AT_ONCE // CHUNK_TOKENS // tiles.size)
    parts = [_shown_at_once(tiles, owner[i : i + step], chunk[i : i + step], rule) for i in range(0, len(owner), step)]
    seen, partly = (np.concatenate([part[i] for part in parts] or [np.zeros(0, np.bool_)]) for i in range(2))
    return seen, partly, torch.cat([part[2] for part in parts] or [torch.empty(0, tiles.size, CHUNK_TOKENS)])


def _shown_at_once(tiles: _Tiles, owner: Array, chunk: Array, rule: MaskRule) -> tuple[Array, Array, Tensor]:
    places = tiles.begins[owner, None] + np.arange(tiles.size)
    low, high = tiles.lows[owner, None], tiles.highs[owner, None]
    # A model's predicate may know no positions that are not there.
    q = torch.from_numpy(np.clip(places, low, high - 1)).view(-1, 1)
    k = torch.from_numpy(chunk * CHUNK_TOKENS)[:, None].repeat_interleave(tiles.size, 0) + torch.arange(CHUNK_TOKENS)
    causal = k <= q
    shown = rule.allowed(q, k) & causal
    real = torch.from_numpy((low <= places) & (places < high)).view(-1, 1)
    by_visit = (len(owner), tiles.size * CHUNK_TOKENS)
    seen, differs = ((x & real).view(by_visit).any(1).numpy() for x in (shown, shown ^ causal))
    partly = seen & differs
    return seen, partly, shown.view(len(owner), tiles.size, CHUNK_TOKENS)[torch.from_numpy(partly)].to(torch.uint8)

"""Which tiles of queries a row has, and which chunks each visits: tables for the kernel. Made once per row and mask rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.attention.visits import Visit, row_visits
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, Place
from flexgen_helm.memory.copies import to_device, upload

PLACES: tuple[Place, ...] = ("transient", "device", "staged")
"""Places of pages that a GPU reads, numbered as in the kernel."""
TILE_BYTES, MOST_QUERIES = 128, 64
"""Bytes of a column of a tile of prompts, queries times the heads that share a K/V head, and most queries. Twice as many spill
registers with heads of 128 and 256 (ptxas for sm_90a)."""
SEEN, CAUSAL, MASKED = range(3)
"""Kinds of visits: all keys are seen; those up to the query; number 2 + i: those of mask i."""


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
        tiles: list[list[int]] = []
        visits: list[list[int]] = []
        masks: list[Tensor] = []
        for tile in _tiles(pages, size):
            tiles.append([*tile.place, len(visits)])
            for visit, shown in tile.shown(rule):
                found = [pages.find(page, visit.form) for page in visit.pages]
                kind = CAUSAL if visit.is_own else SEEN
                if shown is not None:
                    kind = MASKED + len(masks)
                    masks.append(shown)
                places, numbers = [PLACES.index(place) for place, _ in found], [number for _, number in found]
                visits.append([kind, int(visit.form == "sealed"), *places, *numbers])
        tiles.append([0, 0, 0, 0, len(visits)])
        table = torch.stack(masks) if masks else torch.zeros(1, size, CHUNK_TOKENS, dtype=torch.uint8)
        lines = [upload(x, device, torch.int32) for x in (tiles, visits or [[0] * 10])]
        return cls(size, lines[0], lines[1], to_device(table, device), torch.zeros(1, dtype=torch.long, device=device))


@dataclass(frozen=True)
class _Tile:
    """Queries of one sequence at positions ``[begin, begin + size)``, of which those in ``[low, high)`` are real."""

    begin: int
    low: int
    high: int
    first: int
    """Row position of the place at ``begin``, whether a query is there or not."""
    size: int
    visits: list[Visit]

    @property
    def place(self) -> tuple[int, int, int, int]:
        """The tile's line of `TilePlan.tiles`, without its visits."""
        return self.first, self.low - self.begin, self.high - self.begin, self.begin % CHUNK_TOKENS

    def shown(self, rule: MaskRule) -> Iterator[tuple[Visit, Tensor | None]]:
        """Yield the visits in which a query sees a key, each with its mask; None: what causality shows."""
        if rule.causal_only:
            yield from ((visit, None) for visit in self.visits)
            return
        # A model's predicate may know no positions that are not there.
        q = torch.arange(self.begin, self.begin + self.size).clamp(self.low, self.high - 1)[:, None]
        for visit in self.visits:
            k = visit.chunk * CHUNK_TOKENS + torch.arange(CHUNK_TOKENS)[None]
            causal = k <= q
            shown = rule.allowed(q, k) & causal
            real = slice(self.low - self.begin, self.high - self.begin)
            if torch.equal(shown[real], causal[real]):
                yield visit, None
            elif shown[real].any():
                yield visit, shown.to(torch.uint8)


def _tiles(pages: RowPages, size: int) -> Iterator[_Tile]:
    """Tiles of a row, sequence by sequence, each with its visits in order of position."""
    for _, found in groupby(row_visits(pages.row), key=lambda visit: visit.offset):
        visits = list(found)
        segment, offset = visits[0].segment, visits[0].offset
        for begin in range(segment.start // size * size, segment.end, size):
            low, high = max(begin, segment.start), min(begin + size, segment.end)
            mine = [visit for visit in visits if visit.first < high and visit.last > low]
            yield _Tile(begin, low, high, offset + begin - segment.start, size, mine)

"""Which queries of a row visit which chunk of keys, and how visits are grouped into kernel calls. Plain Python without torch.

Keys come in chunks of 128 by absolute position. A *visit* is a run of queries of one sequence that attends to one chunk. A
kernel call computes visits of one of three kinds:

* **own**: queries that lie in the chunk themselves, so that causality hides a part of it from them (prefill rows);
* **shared**: all queries of the row behind the chunk, of every sequence that has its pages, so that it is read once;
* **single**: one query for each chunk (decode rows), where no other query of the row reads the chunk's pages.

`flexgen_helm.attention.calls` makes tensors of this; a cost model counts it. A model's mask may hide whole visits. Only
tensors tell, so the visits here are those that causality allows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Literal, NamedTuple

from flexgen_helm.attention.row_pages import RowPages, chunk_pages, earlier_form, exact_table
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, Form, Place
from flexgen_helm.schedule.rows import Row, Segment

WINDOW_CHUNKS = 4
"""Chunks of keys whose outputs are held until they are merged. A call never holds chunks of two windows."""
QUERY_PAD = 16
"""The number of queries in a shared call is a multiple of this."""
OWN_QUERIES = (16, 32, 64, 96, 128)
"""Numbers of queries to which visits of a sequence's own chunk are padded."""


class Visit(NamedTuple):
    """Queries of one segment that attend to one chunk of keys.

    Attributes:
        segment: The segment of the row.
        offset: Tokens of the row before the segment.
        chunk: Number of the chunk: it has the keys at positions ``[128 * chunk, 128 * (chunk + 1))``.
        first: Absolute position of the first query.
        last: Absolute position behind the last query.
        form: The form in which the queries read the chunk.
        pages: The chunk's four pages. Where the sequence has fewer, its last page is repeated, and masked.
    """

    segment: Segment
    offset: int
    chunk: int
    first: int
    last: int
    form: Form
    pages: tuple[int, ...]

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        return self.last - self.first

    @property
    def rows(self) -> range:
        """Row positions of the queries."""
        return range(self.offset + self.first - self.segment.start, self.offset + self.last - self.segment.start)

    @property
    def is_own(self) -> bool:
        """Whether the queries lie in the chunk; if not, all of them lie behind it."""
        return self.first < (self.chunk + 1) * CHUNK_TOKENS


class VisitGroup(NamedTuple):
    """Visits of one kernel call, which has the same number of queries for each of its chunks.

    Attributes:
        kind: See the module.
        chunks: For each chunk of the call, all of one form, the visits to it. Several visits to one chunk are of different
            sequences.
        num_queries: Queries for each chunk, padding included.
    """

    kind: Literal["own", "shared", "single"]
    chunks: list[list[Visit]]
    num_queries: int


def row_visits(row: Row) -> Iterator[Visit]:
    """All visits of a row: each (query, key) pair that causality allows is in exactly one."""
    offset = 0
    for segment in row.segments:
        earlier, tables = earlier_form(segment), {"sealed": segment.table, "exact": exact_table(segment)}
        for chunk in range((segment.end - 1) // CHUNK_TOKENS + 1):
            low, high = chunk * CHUNK_TOKENS, (chunk + 1) * CHUNK_TOKENS
            if segment.end > high:
                pages = chunk_pages(tables[earlier], chunk)
                yield Visit(segment, offset, chunk, max(segment.start, high), segment.end, earlier, pages)
            first, last = max(segment.start, low), min(segment.end, high)
            if first < last:
                yield Visit(segment, offset, chunk, first, last, "exact", chunk_pages(tables["exact"], chunk))
        offset += len(segment.tokens)


def row_groups(pages: RowPages) -> list[list[VisitGroup]]:
    """Visits of a row in as few kernel calls as possible, for each window of `WINDOW_CHUNKS` chunks, in order of position."""
    by_window: dict[int, list[Visit]] = defaultdict(list)
    for visit in row_visits(pages.row):
        by_window[visit.chunk // WINDOW_CHUNKS].append(visit)
    return [_window_groups(pages, by_window[i]) for i in sorted(by_window)]


def visit_places(pages: RowPages, visit: Visit) -> frozenset[Place]:
    """The places of a visit's pages."""
    return frozenset([pages.find(page, visit.form)[0] for page in visit.pages])


def _window_groups(pages: RowPages, visits: list[Visit]) -> list[VisitGroup]:
    own: list[Visit] = []
    together: dict[tuple[Form, int, tuple[int, ...]], list[Visit]] = defaultdict(list)
    for visit in visits:
        if visit.is_own:
            own.append(visit)
        else:
            together[visit.form, visit.chunk, visit.pages].append(visit)
    if pages.row.kind == "decode":
        alone = [group[0] for group in together.values() if len(group) == 1]
        shared = [_shared(group) for group in together.values() if len(group) > 1]
        return _singles(pages, alone + own) + shared
    return _own(pages, own) + [_shared(group) for group in together.values()]


def _own(pages: RowPages, visits: list[Visit]) -> list[VisitGroup]:
    """Own chunks with as many queries after padding, and pages at the same places, in one call."""
    buckets: dict[tuple[frozenset[Place], int], list[list[Visit]]] = defaultdict(list)
    for visit in visits:
        size = next(size for size in OWN_QUERIES if size >= visit.num_queries)
        buckets[visit_places(pages, visit), size].append([visit])
    return [VisitGroup("own", chunks, size) for (_, size), chunks in buckets.items()]


def _shared(visits: list[Visit]) -> VisitGroup:
    num_queries = sum(visit.num_queries for visit in visits)
    return VisitGroup("shared", [visits], -(-num_queries // QUERY_PAD) * QUERY_PAD)


def _singles(pages: RowPages, visits: list[Visit]) -> list[VisitGroup]:
    """Single queries whose chunks have pages of the same form at the same places in one call."""
    by_places: dict[tuple[Form, frozenset[Place]], list[list[Visit]]] = defaultdict(list)
    for visit in visits:
        by_places[visit.form, visit_places(pages, visit)].append([visit])
    return [VisitGroup("single", chunks, 1) for chunks in by_places.values()]

"""Where the pages of a row are, and which of them must be brought before it attends."""

from __future__ import annotations

from flexgen_helm.memory.paged_cache import PagedCache, Place
from flexgen_helm.memory.pages import PAGE_TOKENS
from flexgen_helm.memory.working_set import StagedPages
from flexgen_helm.schedule.rows import Row, Segment

CHUNK_TOKENS = 128
CHUNK_PAGES = CHUNK_TOKENS // PAGE_TOKENS


class RowPages:
    """The pages that a row touches."""

    def __init__(self, row: Row, cache: PagedCache, *, host_attends: bool = False) -> None:
        """Sort them.

        Args:
            row: The row.
            cache: Says which tier has which page.
            host_attends: Whether chunks of keys that are on the host as a whole are met there.
        """
        self._cache, self.host_attends = cache, host_attends
        kept = [segment for segment in row.segments if segment.kept]
        touched: dict[int, None] = {}
        for segment in kept:
            touched |= dict.fromkeys([*segment_table(segment), *(segment.copy or ())[:1]])
        self._on_host = _host_pages(kept, cache) if host_attends else frozenset()
        self.places: set[Place] = {self.place(page, kept=True) for page in touched}
        """Where they are."""
        if len(kept) < len(row.segments):
            self.places.add("transient")
        self.staged = _staged([page for page in touched if self.place(page, kept=True) == "staged"], kept)
        """Those that must be brought."""
        self._order = {page: i for i, page in enumerate(self.staged.pages)}

    def place(self, page: int, *, kept: bool) -> Place:
        """Where attention finds a page."""
        if not kept:
            return "transient"
        return "host" if page in self._on_host else self._cache.place(page)

    def index(self, page: int, place: Place) -> int:
        """The number of a page among those of its place."""
        if place == "staged":
            return self._order[page]
        return page if place == "transient" else self._cache.index(page)


def _host_pages(segments: list[Segment], cache: PagedCache) -> frozenset[int]:
    """Host pages of which no chunk holds pages of other tiers, directly or by way of other chunks."""
    chunks = {
        frozenset(table[i : i + CHUNK_PAGES])
        for table in map(segment_table, segments)
        for i in range(0, len(table), CHUNK_PAGES)
    }
    elsewhere = {page for chunk in chunks for page in chunk if cache.tier_of(page) != "host"}
    while mixed := [chunk for chunk in chunks if chunk & elsewhere]:
        elsewhere.update(*mixed)
        chunks.difference_update(mixed)
    return frozenset().union(*chunks)


def _staged(pages: list[int], segments: list[Segment]) -> StagedPages:
    begun: set[int] = set()
    written: set[int] = set()
    for segment in segments:
        table = segment_table(segment)
        written.update(table[segment.start // PAGE_TOKENS :])
        begun.update(table[-(-segment.start // PAGE_TOKENS) :])
        if segment.copy is not None:
            begun.add(segment.copy[1])
    return StagedPages(pages, frozenset(pages) - begun, frozenset(pages) & written)


def segment_table(segment: Segment) -> list[int]:
    """Pages of a segment's sequence up to its end; those that come later hold nothing yet."""
    return segment.table[: (segment.end - 1) // PAGE_TOKENS + 1]

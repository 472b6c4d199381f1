"""Where the pages of a row are, and which of them must be brought before it attends."""

from __future__ import annotations

from flexgen_helm.memory.cache import PagedCache, Place
from flexgen_helm.memory.pages import PAGE_TOKENS
from flexgen_helm.memory.working_set import StagedPages
from flexgen_helm.schedule.rows import Row, Segment


class RowPages:
    """The pages that a row touches."""

    def __init__(self, row: Row, cache: PagedCache) -> None:
        self._cache = cache
        kept = [segment for segment in row.segments if segment.kept]
        touched: dict[int, None] = {}
        for segment in kept:
            touched |= dict.fromkeys([*segment_table(segment), *(segment.copy or ())[:1]])
        self.places: set[Place] = {cache.place(page) for page in touched}
        """Where they are."""
        if len(kept) < len(row.segments):
            self.places.add("transient")
        self.staged = _staged([page for page in touched if cache.place(page) == "staged"], kept)
        """Those that must be brought."""
        self._order = {page: i for i, page in enumerate(self.staged.pages)}

    def place(self, page: int, *, kept: bool) -> Place:
        """Where attention finds a page."""
        return self._cache.place(page) if kept else "transient"

    def index(self, page: int, place: Place) -> int:
        """The number of a page among those of its place."""
        if place == "staged":
            return self._order[page]
        return page if place == "transient" else self._cache.index(page)


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

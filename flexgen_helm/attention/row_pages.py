"""The pages of a row: where attention reads each, and which must be brought before it attends. Plain Python without torch."""

from __future__ import annotations

from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PageMap, Place, StagedPages
from flexgen_helm.schedule.rows import Row, Segment

CHUNK_TOKENS = 128
"""Keys in a chunk, by absolute position: attention works in chunks of this size."""
CHUNK_PAGES = CHUNK_TOKENS // PAGE_TOKENS


class RowPages:
    """The pages that a row touches. Made once per row and sweep."""

    def __init__(self, row: Row, page_map: PageMap, *, host_attends: bool = False) -> None:
        """Sort the pages by their place.

        Args:
            row: The row. Its segments' page tables are final.
            page_map: Says which tier has which page.
            host_attends: Whether the CPU attends beside a device with a memory of its own, and so reads host pages in place.
        """
        self.row, self.host_attends = row, host_attends
        kept = [segment for segment in row.segments if segment.kept]
        touched: dict[int, None] = {}
        for segment in kept:
            touched |= dict.fromkeys([*segment_table(segment), *(segment.copy or ())[:1]])
        places: dict[int, Place] = {
            page: "host" if host_attends and page_map.tier_of(page) == "host" else page_map.place(page) for page in touched
        }
        self.places: set[Place] = set(places.values())
        """All places of the row's pages."""
        if len(kept) < len(row.segments):
            self.places.add("transient")
        self.staged = _staged([page for page, place in places.items() if place == "staged"], kept)
        """The pages that must be brought."""
        order = {page: i for i, page in enumerate(self.staged.pages)}
        self._found = {
            page: (place, order[page] if place == "staged" else page_map.index(page)) for page, place in places.items()
        }

    def find(self, page: int, *, kept: bool) -> tuple[Place, int]:
        """The place where attention reads a page of the row, and the page's number among those of the place.

        Staged pages are numbered by their order in `staged.pages`.
        """
        return self._found[page] if kept else ("transient", page)


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
    """Pages of a segment's sequence up to its end; later pages hold nothing yet."""
    return segment.table[: (segment.end - 1) // PAGE_TOKENS + 1]

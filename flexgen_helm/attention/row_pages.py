"""The pages of a row: where attention reads each, and which must be brought before it attends. Plain Python without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PAGE_TOKENS, Form, PageMap, Place, StagedPages
from flexgen_helm.schedule.rows import Row, Segment


class RowPages:
    """The pages that a row touches. Made once per row and sweep."""

    def __init__(self, row: Row, page_maps: Mapping[Form, PageMap], *, host_attends: bool = False) -> None:
        """Sort the pages by their place.

        Args:
            row: The row. Its segments' page tables are final.
            page_maps: Say which tier has which page of each form.
            host_attends: Whether the CPU attends beside a device with a memory of its own, and so reads host pages in place.
        """
        self.row, self.host_attends = row, host_attends
        forms: tuple[Form, ...] = ("exact", "sealed") if "sealed" in page_maps else ("exact",)
        self.places: dict[Form, set[Place]] = {}
        """All places of the row's pages of each form."""
        self.staged: dict[Form, StagedPages] = {}
        """The pages of each form that must be brought."""
        self._found: dict[Form, dict[int, tuple[Place, int]]] = {}
        for form in forms:
            self._sort(form, page_maps[form], [touched_pages(segment, form) for segment in row.segments])

    def find(self, page: int, form: Form) -> tuple[Place, int]:
        """The place where attention reads a page of the row, and the page's number among those of the place.

        Staged pages are numbered by their order in `staged`.
        """
        return self._found[form][page]

    def _sort(self, form: Form, page_map: PageMap, touched: list[TouchedPages]) -> None:
        pages = dict.fromkeys(page for each in touched for page in each.pages)
        places = {page: self._place(page, page_map) for page in pages}
        self.places[form] = set(places.values())
        staged = [page for page, place in places.items() if place == "staged"]
        begun, written = (frozenset().union(*sets) for sets in zip(*((x.begun, x.written) for x in touched), strict=True))
        self.staged[form] = StagedPages(staged, frozenset(staged) - begun, frozenset(staged) & written)
        order = {page: i for i, page in enumerate(staged)}
        self._found[form] = {
            page: (place, order[page] if place == "staged" else page_map.index(page)) for page, place in places.items()
        }

    def _place(self, page: int, page_map: PageMap) -> Place:
        if self.host_attends and page >= 0 and page_map.tier_of(page) == "host":
            return "host"
        return page_map.place(page)


class TouchedPages(NamedTuple):
    """Pages of one form that a segment touches."""

    pages: list[int]
    """All of them."""
    begun: frozenset[int]
    """Those that hold nothing when the segment comes."""
    written: frozenset[int]
    """Those into which it writes."""


def touched_pages(segment: Segment, form: Form) -> TouchedPages:
    """Return what a segment touches: exact pages of its own chunks, or all if nothing is sealed; sealed pages before them."""
    first, whole = segment.start // PAGE_TOKENS, -(-segment.start // PAGE_TOKENS)
    if form == "sealed":
        read = (segment.end - 1) // CHUNK_TOKENS * CHUNK_PAGES
        sealed = segment.table[first : segment.end // PAGE_TOKENS]
        return TouchedPages([*segment.table[:read], *sealed], frozenset(sealed), frozenset(sealed))
    table = exact_table(segment)
    begin = 0 if segment.exact is None else segment.start // CHUNK_TOKENS * CHUNK_PAGES
    source, target = segment.copy[:2] if segment.copy is not None else (None, None)
    begun = {*table[whole:], *([] if target is None else [target])}
    pages = [*table[begin:], *([] if source is None else [source])]
    return TouchedPages(pages, frozenset(begun), frozenset(table[first:]))


def sealed_now(segment: Segment) -> list[tuple[int, int]]:
    """Exact and sealed number of every page that is full once a segment is written; none if nothing is sealed."""
    if segment.exact is None:
        return []
    full = slice(segment.start // PAGE_TOKENS, segment.end // PAGE_TOKENS)
    return list(zip(segment.exact[full], segment.table[full], strict=True))


def exact_table(segment: Segment) -> list[int]:
    """Exact pages of a segment's sequence up to its end; later pages hold nothing yet."""
    return _until(segment.table if segment.exact is None else segment.exact, segment)


def earlier_form(segment: Segment) -> Form:
    """The form in which a segment's tokens read chunks before their own: pages of ``table``."""
    return "exact" if segment.exact is None else "sealed"


def _until(table: list[int], segment: Segment) -> list[int]:
    return table[: (segment.end - 1) // PAGE_TOKENS + 1]

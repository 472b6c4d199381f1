"""The pages of a row: where attention reads each, and which must be brought before it attends. Without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple, get_args

import numpy as np

from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PAGE_TOKENS, Form, PageMap, Place, StagedPages
from flexgen_helm.schedule.rows import Row, Segment
from flexgen_helm.types import TIERS, Tier

PLACES: tuple[Place, ...] = get_args(Place)
Array = np.ndarray[Any, Any]


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
        self._spots: dict[Form, dict[int, int]] = {}
        for form in forms:
            self._sort(form, page_maps[form], [touched_pages(segment, form) for segment in row.segments])

    def find(self, page: int, form: Form) -> tuple[Place, int]:
        """The place where attention reads a page of the row, and the page's number among those of the place.

        Staged pages are numbered by their order in `staged`.
        """
        number, place = divmod(self._spots[form][page], len(PLACES))
        return PLACES[place], number

    def spots(self, pages: Iterable[int], form: Form) -> Iterable[int]:
        """Where pages are, as numbers that `located` understands; for many pages at once, of which a plan has thousands."""
        return map(self._spots[form].__getitem__, pages)

    def _sort(self, form: Form, page_map: PageMap, touched: list[TouchedPages]) -> None:
        pages = list(dict.fromkeys(chain.from_iterable(each.pages for each in touched)))
        places, indices = self._places(np.array(pages, np.int64), page_map)
        self.places[form] = {PLACES[i] for i in set(places.tolist())}
        is_staged = places == PLACES.index("staged")
        staged = list(compress(pages, is_staged))
        begun, written = (frozenset().union(*sets) for sets in zip(*((x.begun, x.written) for x in touched), strict=True))
        self.staged[form] = StagedPages(staged, frozenset(staged) - begun, frozenset(staged) & written)
        indices[is_staged] = np.arange(len(staged))
        self._spots[form] = dict(zip(pages, (len(PLACES) * indices + places).tolist(), strict=True))

    def _places(self, pages: Array, page_map: PageMap) -> tuple[Array, Array]:
        """The places of pages as numbers in `PLACES`, and the pages' numbers there, before staged ones are numbered."""
        capacities = page_map.capacities
        tiers = np.zeros_like(pages)
        indices = pages.copy()
        if capacities is not None:
            firsts = np.array([capacities.first(tier) for tier in TIERS])
            tiers = np.searchsorted(firsts[1:], pages, side="right")
            indices -= firsts[tiers]
        transient = pages < 0
        indices[transient] = ~pages[transient]  # as `transient_page` does
        places = np.array([PLACES.index(self._place(tier, page_map)) for tier in TIERS])[tiers]
        places[transient] = PLACES.index("transient")
        return places, indices

    def _place(self, tier: Tier, page_map: PageMap) -> Place:
        return "host" if self.host_attends and tier == "host" else page_map.place_of_tier(tier)


def located(spots: Sequence[int], names: Sequence[Place]) -> tuple[Array, Array]:
    """Take `RowPages.spots` apart.

    Returns:
        The place of each page as a number in ``names``, and its number among the pages of the place.
    """
    numbers, places = np.divmod(np.array(spots, np.int64), len(PLACES))
    named = np.array([names.index(place) if place in names else -1 for place in PLACES])[places]
    assert (named >= 0).all(), f"pages at other places than {', '.join(names)}"
    return named, numbers


def counted(counts: Array) -> Array:
    """0 to n - 1 for each n of some counts, one after the other."""
    ends = np.cumsum(counts)
    found: Array = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return found


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


def exact_table(segment: Segment, first: int = 0) -> list[int]:
    """Exact pages of a segment's sequence, from the first one of interest up to its end; later pages hold nothing yet."""
    table = segment.table if segment.exact is None else segment.exact
    return table[first : (segment.end - 1) // PAGE_TOKENS + 1]


def chunk_pages(table: list[int], chunk: int) -> tuple[int, ...]:
    """The four pages of a chunk; where a sequence has fewer, its last page is repeated."""
    found = table[chunk * CHUNK_PAGES : (chunk + 1) * CHUNK_PAGES]
    return tuple(found + found[-1:] * (CHUNK_PAGES - len(found)))


def earlier_form(segment: Segment) -> Form:
    """The form in which a segment's tokens read chunks before their own: pages of ``table``."""
    return "exact" if segment.exact is None else "sealed"

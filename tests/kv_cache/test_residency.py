"""Tiers and slots of pages against naive models of them."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.kv_cache.pages import PageCounts, PageMap, Residency, StagedPages
from flexgen_helm.types import TIERS

NUM_PAGES, NUM_LAYERS, MOST_ROWS = 8, 2, 3


@settings(derandomize=True, max_examples=50)
@given(st.builds(PageCounts, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), st.booleans())
def test_page_map_is_a_list_of_tiers(capacities: PageCounts, own_memory: bool) -> None:
    page_map = PageMap(capacities, own_memory)
    seen: Counter[str] = Counter()
    tiers = [tier for tier, count in zip(TIERS, capacities, strict=True) for _ in range(count)]
    read_in_place = {"device"} if own_memory else {"device", "host"}
    for page, tier in enumerate(tiers):
        assert page_map.tier_of(page) == tier
        assert page_map.index(page) == seen[tier]
        assert page_map.place(page) == (tier if tier in read_in_place else "staged")
        seen[tier] += 1


def test_without_capacities_every_page_is_on_the_device() -> None:
    page_map = PageMap()
    assert [(page_map.tier_of(page), page_map.place(page), page_map.index(page)) for page in (0, 7)] == [
        ("device", "device", 0),
        ("device", "device", 7),
    ]


class Loaded(NamedTuple):
    """A row of the naive model."""

    j: int
    staged: StagedPages


@st.composite
def staged_pages(draw: st.DrawFn) -> StagedPages:
    pages = draw(st.lists(st.integers(0, NUM_PAGES - 1), unique=True))
    reads = draw(st.frozensets(st.sampled_from(pages))) if pages else frozenset()
    writes = draw(st.frozensets(st.sampled_from(pages))) if pages else frozenset()
    return StagedPages(pages, reads, writes)


STEPS = st.lists(st.tuples(st.integers(0, NUM_LAYERS - 1), staged_pages(), st.integers(0, 20)), min_size=1, max_size=30)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(STEPS)
def test_residency_is_what_loaded_rows_touch(steps: list[tuple[int, StagedPages, int]]) -> None:
    """The naive model knows the loaded rows only, and which pages were written since they came."""
    residency = Residency()
    residency.reset(MOST_ROWS * NUM_PAGES)
    loaded: list[Loaded] = []
    written: set[tuple[int, int]] = set()
    slot_of: dict[tuple[int, int], int] = {}
    for j, staged, which in steps:
        if len(loaded) == MOST_ROWS:
            release(residency, loaded, written, slot_of, which)
        here = {(row.j, page) for row in loaded for page in row.staged.pages}
        found = residency.load(j, staged)
        assert set(found.missing) == {page for page in staged.reads if (j, page) not in here}
        for page, slot in zip(staged.pages, found.slots, strict=True):
            assert slot_of.get((j, page), slot) == found.missing.get(page, slot) == slot
            slot_of[j, page] = slot
        assert len(set(slot_of.values())) == len(slot_of)
        assert set(slot_of.values()) <= set(range(MOST_ROWS * NUM_PAGES))
        loaded.append(Loaded(j, staged))
    while loaded:
        release(residency, loaded, written, slot_of, 0)
    assert not slot_of


def release(
    residency: Residency,
    loaded: list[Loaded],
    written: set[tuple[int, int]],
    slot_of: dict[tuple[int, int], int],
    which: int,
) -> None:
    """Release one of the loaded rows, here and in the naive model."""
    j, staged = loaded.pop(which % len(loaded))
    written |= {(j, page) for page in staged.writes}
    still = {(row.j, page) for row in loaded for page in row.staged.pages}
    gone = {(j, page) for page in staged.pages} - still
    expected = {page: slot_of[j, page] for _, page in gone if (j, page) in written}
    assert residency.release(j, staged) == expected
    written -= gone
    for key in gone:
        del slot_of[key]


def test_reset_forgets_pages() -> None:
    residency = Residency()
    residency.reset(1)
    staged = StagedPages([5], frozenset([5]), frozenset())
    assert residency.load(0, staged).missing == {5: 0}
    residency.reset(2)
    assert residency.load(0, staged).missing == {5: 0}

"""The pages of a row against what its tokens touch, one by one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS, PAGE_TOKENS, PageCounts, PageMap, transient_page
from flexgen_helm.schedule.rows import Row, Segment

CAPACITIES = PageCounts(12, 12, 100)


@st.composite
def segments(draw: st.DrawFn) -> list[Segment]:
    """Sequences with pages of any tiers; some part from others inside a page."""
    found: list[Segment] = []
    free = list(draw(st.permutations(range(60))))
    source = free.pop()
    for _ in range(draw(st.integers(1, 4))):
        start, count = draw(st.integers(0, 200)), draw(st.integers(1, 70))
        table = [free.pop() for _ in range(-(-(start + count) // PAGE_TOKENS))]
        partial = start % PAGE_TOKENS
        parts = partial and draw(st.booleans())
        copy = (source, table[start // PAGE_TOKENS], partial) if parts else None
        if draw(st.booleans()):
            table = [transient_page(page) for page in table]
            copy = copy and (transient_page(copy[0]), table[start // PAGE_TOKENS], partial)
        found.append(Segment((0,) * count, start, table, copy=copy))
    return found


@settings(derandomize=True, max_examples=80)
@given(segments(), st.booleans())
def test_pages_hold_what_tokens_touch(parts: list[Segment], own_memory: bool) -> None:
    page_map = PageMap(CAPACITIES, own_memory)
    pages = RowPages(Row("prefill", 512, parts), {"exact": page_map})
    read: set[int] = set()
    written: set[int] = set()
    for segment in parts:
        written |= {segment.table[position // PAGE_TOKENS] for position in range(segment.start, segment.end)}
        copied = set(segment.table[segment.start // PAGE_TOKENS :][:1]) if segment.copy is not None else set()
        read |= {segment.table[position // PAGE_TOKENS] for position in range(segment.start)} - copied
        read |= {segment.copy[0]} if segment.copy is not None else set()
    touched = read | written
    staged = {page for page in touched if page_map.place(page) == "staged"}
    assert len(pages.staged["exact"].pages) == len(staged)
    assert set(pages.staged["exact"].pages) == staged
    assert pages.staged["exact"].reads == read & staged
    assert pages.staged["exact"].writes == written & staged
    places = {page_map.place(page) for page in touched}
    assert pages.places["exact"] == places
    for page in touched:
        place, index = pages.find(page, "exact")
        assert place == page_map.place(page)
        assert index == (pages.staged["exact"].pages.index(page) if place == "staged" else page_map.index(page))


def test_pages_on_the_host_are_read_there_where_the_cpu_attends() -> None:
    """Pages 12 to 23 are on the host, page 0 on the device and page 40 on disk."""
    row = Row("decode", 16, [Segment((0,), CHUNK_TOKENS - 1, [12, 0, 23, 40])])
    pages = RowPages(row, {"exact": PageMap(CAPACITIES, own_memory=True)}, host_attends=True)
    assert [pages.find(page, "exact") for page in (12, 0, 23, 40)] == [
        ("host", 0),
        ("device", 0),
        ("host", 11),
        ("staged", 0),
    ]

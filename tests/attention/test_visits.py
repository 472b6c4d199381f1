"""Visits against every pair of a query and a key; calls against the picture in their module."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.attention.calls import Index, plan_attention
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.attention.visits import OWN_QUERIES, QUERY_PAD, WINDOW_CHUNKS, row_groups, row_visits
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PAGE_TOKENS, PageCounts, PageMap, transient_page
from flexgen_helm.schedule.rows import Row, Segment

CAUSAL = MaskRule(lambda q, k: k <= q, True)
CPU = torch.device("cpu")


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """A row of sequences behind a prefix of whole pages that all or none share, kept or transient."""
    kind: Literal["prefill", "decode"] = draw(st.sampled_from(["prefill", "decode"]))
    shared = draw(st.integers(0, 24))
    segments: list[Segment] = []
    next_page = shared
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, 900))
        count = 1 if kind == "decode" else draw(st.integers(1, 300))
        pages = -(-(start + count) // PAGE_TOKENS)
        common = draw(st.sampled_from([0, min(shared, start // PAGE_TOKENS)]))
        # A table may go on behind the segment: pages for tokens to come.
        table = list(range(common)) + list(range(next_page, next_page + pages - common + draw(st.integers(0, 2))))
        next_page += pages - common + 2
        if draw(st.booleans()):
            table = [transient_page(page) for page in table]
        segments.append(Segment((0,) * count, start, table))
    return Row(kind, sum(len(segment.tokens) for segment in segments) + draw(st.integers(0, 20)), segments)


@settings(derandomize=True, max_examples=15, deadline=None)
@given(rows())
def test_every_pair_that_causality_allows_is_in_exactly_one_visit(row: Row) -> None:
    """A pair is a row position and a key's page and place in the page."""
    expected = Counter(
        (offset + i, segment.table[k // PAGE_TOKENS], k % PAGE_TOKENS, k)
        for offset, segment in with_offsets(row)
        for i in range(len(segment.tokens))
        for k in range(segment.start + i + 1)
    )
    found = Counter(
        (t, visit.pages[k // PAGE_TOKENS], k % PAGE_TOKENS, visit.chunk * CHUNK_TOKENS + k)
        for visit in row_visits(row)
        for t, position in zip(visit.rows, range(visit.first, visit.last), strict=True)
        for k in range(CHUNK_TOKENS)
        if visit.chunk * CHUNK_TOKENS + k <= position
    )
    assert found == expected


def with_offsets(row: Row) -> list[tuple[int, Segment]]:
    lengths = [len(segment.tokens) for segment in row.segments]
    return [(sum(lengths[:i]), segment) for i, segment in enumerate(row.segments)]


@settings(derandomize=True, max_examples=15, deadline=None)
@given(rows(), st.booleans(), st.booleans())
def test_groups_hold_every_visit_once_and_nothing_that_no_kernel_can_do(row: Row, own_memory: bool, host_attends: bool) -> None:
    pages = RowPages(row, {"exact": PageMap(PageCounts(20, 30, 1000), own_memory)}, host_attends=host_attends)
    windows = row_groups(pages)
    visits = list(row_visits(row))
    grouped = [visit for groups in windows for group in groups for chunk in group.chunks for visit in chunk]
    assert sorted(map(repr, grouped)) == sorted(map(repr, visits))
    for groups in windows:
        assert len({v.chunk // WINDOW_CHUNKS for group in groups for chunk in group.chunks for v in chunk}) == 1
        for group in groups:
            for chunk in group.chunks:
                # All its queries read the same pages of the same chunk.
                assert len({(visit.chunk, visit.pages) for visit in chunk}) == 1
                assert sum(visit.num_queries for visit in chunk) <= group.num_queries
            owns = {visit.is_own for chunk in group.chunks for visit in chunk}
            if group.kind == "own":
                assert (owns, row.kind, group.num_queries in OWN_QUERIES) == ({True}, "prefill", True)
            elif group.kind == "shared":
                assert (owns, len(group.chunks), group.num_queries % QUERY_PAD) == ({False}, 1, 0)
            else:
                assert (row.kind, group.num_queries, {len(chunk) for chunk in group.chunks}) == ("decode", 1, {1})
    alone = [group for groups in windows for group in groups if row.kind == "decode" and group.kind == "shared"]
    assert all(len(group.chunks[0]) > 1 for group in alone)


def values(index: Index) -> list[int]:
    return list(range(index.start, index.stop)) if isinstance(index, slice) else index.tolist()


def test_the_picture_of_a_window_is_true() -> None:
    """See the docstring of flexgen_helm/attention/calls.py."""
    row = Row("prefill", 32, [Segment((0,) * 20, 120, [0, 1, 2, 3, 4]), Segment((0,) * 10, 0, [5])])
    (window,) = plan_attention(RowPages(row, {"exact": PageMap()}), CAUSAL, dtype=torch.float32, device=CPU)
    own, shared = window.calls
    assert (own.num_chunks, shared.num_chunks, window.num_chunks) == (3, 1, 2)
    assert values(own.queries) == [*range(16), *range(8, 24), *range(16, 32)]
    assert values(own.real) == [*range(8), *range(16, 28), *range(36, 46)]
    assert values(own.outputs) == [*range(8), *range(40, 52), *range(20, 30)]
    assert [values(x) for x in (shared.queries, shared.real, shared.outputs)] == [
        [*range(8, 24)],
        [*range(12)],
        [*range(8, 20)],
    ]
    assert window.absent.tolist() == [*range(30, 40), *range(52, 64)]
    assert own.mask is not None
    assert own.mask.shape == (3, 1, 16, CHUNK_TOKENS)
    assert [pages.numbers.tolist() for pages in own.pages] == [[0, 1, 2, 3] + [4] * CHUNK_PAGES + [5] * CHUNK_PAGES]
    assert [(pages.place, pages.which, len(pages.numbers)) for pages in shared.pages] == [("device", None, CHUNK_PAGES)]
    assert (shared.mask, own.dead, shared.dead) == (None, None, None)


def test_layers_with_one_rule_share_a_plan_and_equal_rules_are_one() -> None:
    def allowed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return k <= q

    plans = {MaskRule(allowed, True): 1, MaskRule(allowed, False): 2, CAUSAL: 3}
    assert plans[MaskRule(allowed, True)] == 1
    assert len(plans) == 3

"""Accounting of pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.memory.pages import PAGE_TOKENS, PagePool, num_pages


@settings(derandomize=True, max_examples=100)
@given(st.integers(0, 200), st.integers(0, 200))
def test_num_pages_counts_the_pages_that_positions_touch(start: int, end: int) -> None:
    assert num_pages(start, end) == len({position // PAGE_TOKENS for position in range(start, end)})


@settings(derandomize=True, max_examples=100)
@given(st.lists(st.integers(0, 6), max_size=30), st.randoms(use_true_random=False))
def test_no_page_is_handed_out_twice(counts: list[int], chance: object) -> None:
    pool, held = PagePool(20), []
    for count in counts:
        if count <= pool.num_free:
            held.append(pool.allocate(count))
        elif held:
            pool.release(held.pop(chance.randrange(len(held))))  # type: ignore[attr-defined]
        pages = [page for part in held for page in part]
        assert len(set(pages)) == len(pages) == pool.num_used <= pool.high_water <= pool.capacity
        assert all(0 <= page < pool.high_water for page in pages)


def test_more_than_there_is_is_refused_with_both_numbers() -> None:
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(OutOfSpace, match=r"2 K/V pages.*1 of 3"):
        pool.allocate(2)

"""Accounting of pages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PageCounts, PagePool, num_pages
from flexgen_helm.types import TIERS, Shares

CAPACITIES = st.builds(PageCounts, st.integers(0, 20), st.integers(0, 20), st.integers(0, 20))
SHARES = st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any).map(lambda x: tuple(n / sum(x) for n in x))


@settings(derandomize=True, max_examples=100)
@given(st.integers(0, 200), st.integers(0, 200))
def test_num_pages_counts_the_pages_that_positions_touch(start: int, end: int) -> None:
    assert num_pages(start, end) == len({position // PAGE_TOKENS for position in range(start, end)})


@settings(derandomize=True, max_examples=100)
@given(CAPACITIES, SHARES, st.lists(st.integers(0, 6), max_size=30), st.randoms(use_true_random=False))
def test_no_page_is_handed_out_twice(capacities: PageCounts, shares: Shares, counts: list[int], chance: object) -> None:
    pool, held = PagePool(capacities.device, host=capacities.host, disk=capacities.disk, shares=shares), []
    for count in counts:
        if count <= pool.num_free:
            held.append(pool.allocate(count))
            assert len(held[-1]) == count
        elif held:
            pool.release(held.pop(chance.randrange(len(held))))  # type: ignore[attr-defined]
        pages = [page for part in held for page in part]
        assert len(set(pages)) == len(pages) == pool.num_used <= sum(pool.high_water) <= pool.capacity
        for tier, used, high in zip(TIERS, pool.used, pool.high_water, strict=True):
            first = pool.capacities.first(tier)
            mine = [page for page in pages if pool.capacities.tier_of(page) == tier]
            assert len(mine) == used <= high <= getattr(pool.capacities, tier)
            assert all(first <= page < first + high for page in mine)


def test_more_than_there_is_is_refused_with_both_numbers() -> None:
    pool = PagePool(3)
    pool.allocate(2)
    with pytest.raises(OutOfSpace, match=r"2 K/V pages.*1 of 3"):
        pool.allocate(2)


@settings(derandomize=True, max_examples=100)
@given(SHARES, st.lists(st.integers(1, 6), min_size=1, max_size=40))
def test_realised_shares_are_those_asked_for_to_within_the_largest_run(shares: Shares, counts: list[int]) -> None:
    """No tier is full, so after every run each tier holds its share of all pages but for at most what was asked for at once."""
    pool = PagePool(1000, host=1000, disk=1000, shares=shares)
    for count in counts:
        pages = pool.allocate(count)
        assert len({pool.capacities.tier_of(page) for page in pages}) == 1
        for used, share in zip(pool.used, shares, strict=True):
            assert abs(used - share * pool.num_used) <= 2 * max(counts)


def test_a_run_that_fits_nowhere_whole_is_spread() -> None:
    pool = PagePool(3, host=3, disk=1, shares=(0.5, 0.5, 0.0))
    pages = pool.allocate(7)
    assert sorted(pages) == list(range(7))
    assert pool.used == (3, 3, 1)


def test_a_full_tier_leaves_its_share_to_the_others() -> None:
    pool = PagePool(2, host=50, shares=(1.0, 0.0, 0.0))
    assert [len(pool.allocate(2)) for _ in range(3)] == [2, 2, 2]
    assert pool.used == (2, 4, 0)

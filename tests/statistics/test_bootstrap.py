"""Intervals against SciPy's bootstrap and against what they must be by construction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.statistics.bootstrap import Bootstrap


def test_the_interval_of_a_mean_is_scipys() -> None:
    """Groups of equal size: then the mean over positions is the mean of the groups' means. Both draw at random."""
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, which comes with the extra `helm`")
    values = np.random.default_rng(4).exponential(size=(60, 5))
    expected = stats.bootstrap((values.mean(1),), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    found = Bootstrap(np.repeat(np.arange(60), 5), resamples=20000).mean(values.ravel())
    assert found.value == pytest.approx(values.mean())
    assert found.interval is not None
    width = expected.high - expected.low
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.03 * width)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.sampled_from([0.0, 0.1, 0.5, 0.99, 0.999, 1.0]))
def test_quantiles_are_numpys(values: list[int], share: float) -> None:
    array = np.array(values, dtype=np.float64)
    found = Bootstrap(range(len(array)), resamples=50).quantile(array, share)
    assert found.value == np.quantile(array, share, method="inverted_cdf")
    if len(values) > 1:
        assert found.interval is not None
        assert array.min() <= found.interval[0] <= found.interval[1] <= array.max()


def test_the_interval_of_a_median_covers_as_often_as_it_says() -> None:
    """The median of a uniform distribution is 0.5; of 200 samples about 95 % of the intervals must hold it."""
    generator = np.random.default_rng(8)
    intervals = [Bootstrap(range(80), resamples=200).quantile(generator.random(80), 0.5).interval for _ in range(200)]
    share = np.mean([interval is not None and interval[0] <= 0.5 <= interval[1] for interval in intervals])
    assert 0.88 <= share <= 0.99


def test_groups_are_drawn_as_a_whole() -> None:
    """Two groups of one value each: only 0, 1/2 and 1 can be means, and each extreme comes once in four draws."""
    found = Bootstrap([0, 0, 0, 1, 1, 1]).mean(np.array([0.0, 0, 0, 1, 1, 1]))
    assert (found.value, found.interval) == (0.5, (0.0, 1.0))


def test_one_group_has_no_interval() -> None:
    found = Bootstrap([7, 7, 7])
    assert found.mean(np.array([1.0, 2, 6])).value == 3
    assert found.mean(np.array([1.0, 2, 6])).interval is None
    assert found.quantile(np.array([1.0, 2, 6]), 0.5).interval is None


def test_a_part_of_the_positions_and_a_function_of_the_mean() -> None:
    values, where = np.array([1.0, 2, 3, 4]), np.array([True, False, True, False])
    found = Bootstrap([0, 1, 2, 3]).mean(values, where=where, after=np.exp)
    assert found.value == pytest.approx(np.exp(2.0))
    assert found.interval == pytest.approx((np.exp(1.0), np.exp(3.0)))


def test_equal_input_gives_equal_intervals() -> None:
    values = np.random.default_rng(2).random(30)
    assert Bootstrap(range(30)).mean(values) == Bootstrap(range(30)).mean(values)


def test_a_ratio_is_drawn_over_groups() -> None:
    """Two groups with ratios of 1/2 and 1: each is drawn alone once in four resamples, and both together give 2/3."""
    found = Bootstrap([0, 0, 1]).ratio(np.array([1.0, 0, 1]), np.array([1.0, 1, 1]))
    assert found is not None
    assert found.value == pytest.approx(2 / 3)
    assert found.interval == (0.5, 1.0)


def test_a_ratio_to_nothing_is_none_and_one_to_what_may_be_nothing_has_no_bound() -> None:
    assert Bootstrap([0, 1]).ratio(np.ones(2), np.zeros(2)) is None
    found = Bootstrap([0, 1, 2]).ratio(np.ones(3), np.array([1.0, 0, 0]))
    assert found is not None
    assert (found.value, found.interval) == (3, None)
    found = Bootstrap([0, 1]).ratio(np.ones(2), np.array([3.0, -1.0]))
    assert found is not None
    assert (found.value, found.interval) == (1, None)

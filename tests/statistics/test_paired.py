"""Differences of pairs and recovery against SciPy, against what they must be by construction, and by their coverage."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flexgen_helm.statistics.paired import Paired, paired_difference, recovery

Floats = NDArray[np.float64]
OF_WIDTH = 0.1
"""By how much of its width an interval of 1,000 resamples may be off.

The share of resamples below an end has a deviation of sqrt(0.025 * 0.975 / 1000), which moves the end of a normal distribution
by 0.084 standard errors, or 0.0216 of the width. This is 4.6 times that.
"""


def clustered_answers(generator: np.random.Generator, clusters: int, size: int, drop: float) -> tuple[Floats, Floats]:
    """Right and wrong answers of clusters that are differently hard and lose differently much, ``drop`` on average."""
    right = np.repeat(generator.uniform(0.4, 0.9, clusters), size)
    loss = np.repeat(generator.uniform(0, 2 * drop, clusters), size)
    chance = generator.random(clusters * size)
    return (chance < right).astype(float), (chance < right - loss).astype(float)


def test_interval_and_error_are_scipys() -> None:
    """Each pair its own cluster. Both sides draw at random."""
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, which comes with the extra `helm`")
    generator = np.random.default_rng(2)
    before = generator.random(300)
    after = before + generator.normal(-0.02, 0.1, 300)
    found = paired_difference(before, after)
    expected = stats.bootstrap((after - before,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert found.difference == pytest.approx((after - before).mean())
    assert found.standard_error == pytest.approx(stats.sem(after - before))
    assert found.interval is not None
    assert found.interval == pytest.approx((expected.low, expected.high), abs=OF_WIDTH * (expected.high - expected.low))
    assert (found.num, found.num_clusters, found.num_worse) == (300, 300, (after < before).sum())


def test_recovery_is_the_ratio_that_scipy_bootstraps() -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, which comes with the extra `helm`")
    before, after = clustered_answers(np.random.default_rng(9), 400, 1, 0.05)
    expected = stats.bootstrap(
        (before, after),
        lambda x, y, axis: y.mean(axis) / x.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        rng=1,
    ).confidence_interval
    found = recovery(before, after)
    assert found is not None
    assert found.interval is not None
    assert found.value == pytest.approx(100 * after.mean() / before.mean())
    width = 100 * (expected.high - expected.low)
    assert found.interval == pytest.approx((100 * expected.low, 100 * expected.high), abs=OF_WIDTH * width)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 200 samples with a true difference of -0.05, about 95 % of the intervals hold it; the seed is fixed."""
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 10)
    held = []
    for _ in range(200):
        low, high = paired_difference(*clustered_answers(generator, 40, 10, 0.05), clusters).interval or (np.nan, np.nan)
        held.append(low <= -0.05 <= high)
    assert 0.90 <= np.mean(held) <= 0.99


def test_clusters_widen_what_depends_on_each_other() -> None:
    """All pairs of a cluster change together, so ten clusters of thirty say as much as ten pairs."""
    change = np.array([0, 0, 0, 1, 0, 0, 1, 0, 1, 0.0])
    grouped = paired_difference(np.repeat(change, 30), np.zeros(300), np.repeat(np.arange(10), 30))
    alone = paired_difference(change, np.zeros(10))
    assert grouped.interval == alone.interval
    assert grouped.standard_error == pytest.approx(alone.standard_error)
    assert (grouped.num, grouped.num_clusters, grouped.num_worse) == (300, 10, 90)


def test_no_disagreement_and_all_disagreement() -> None:
    same = np.array([1.0, 0, 1])
    assert paired_difference(same, same) == Paired(0.0, (0.0, 0.0), 0.0, 3, 3, 0)
    assert paired_difference([1, 1, 1], [0, 0, 0]) == Paired(-1.0, (-1.0, -1.0), 0.0, 3, 3, 3)
    assert paired_difference([0, 0, 0], [1, 1, 1]) == Paired(1.0, (1.0, 1.0), 0.0, 3, 3, 0)


def test_one_pair_and_one_cluster_have_neither_interval_nor_error() -> None:
    assert paired_difference([1.0], [0.5]) == Paired(-0.5, None, None, 1, 1, 1)
    assert paired_difference([1, 1], [0, 1], ["a", "a"]) == Paired(-0.5, None, None, 2, 1, 1)


def test_swapping_the_sides_turns_the_interval_round() -> None:
    generator = np.random.default_rng(6)
    before, after = generator.random(50), generator.random(50)
    forth, back = paired_difference(before, after), paired_difference(after, before)
    assert forth.interval is not None
    assert back.interval is not None
    assert forth.difference == pytest.approx(-back.difference)
    assert forth.interval == pytest.approx((-back.interval[1], -back.interval[0]))


def test_recovery_of_a_baseline_that_is_always_wrong_is_none() -> None:
    assert recovery([0, 0, 0], [1, 0, 0]) is None


def test_recovery_has_no_interval_where_the_baseline_may_be_zero_or_there_is_one_cluster() -> None:
    """Three instances with one right answer: eight of 27 resamples hold none."""
    found = recovery([0, 0, 1], [0, 1, 1])
    assert found is not None
    assert (found.value, found.interval) == (200.0, None)
    found = recovery([1, 1], [1, 0], [4, 4])
    assert found is not None
    assert (found.value, found.interval) == (50.0, None)


def test_recovery_without_a_change_is_all_of_it() -> None:
    found = recovery([1, 1, 0.5, 1], [1, 1, 0.5, 1])
    assert found is not None
    assert (found.value, found.interval) == (100.0, (100.0, 100.0))


def test_recovery_of_negative_scores() -> None:
    """Log-probabilities: the ratio is the same one, and its interval is bounded."""
    found = recovery([-1.0, -2.0, -1.0, -4.0], [-2.0, -4.0, -2.0, -8.0])
    assert found is not None
    assert (found.value, found.interval) == (200.0, (200.0, 200.0))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([], [], "before are empty"),
        ([1.0], [float("nan")], "1 of 1 values of after are NaN"),
        ([1.0, 2.0], [1.0], "2 values before and 1 after"),
    ],
)
def test_what_are_no_pairs_is_refused(before: list[float], after: list[float], message: str) -> None:
    for function in (paired_difference, recovery):
        with pytest.raises(ValueError, match=message):
            function(before, after)

"""Means and their errors against statsmodels, against the closed form and against Miller's formula."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.statistics.clustered import Mean, mean_with_error


@pytest.mark.parametrize("num_clusters", [2, 3, 40])
def test_the_error_is_that_of_statsmodels(num_clusters: int) -> None:
    api = pytest.importorskip("statsmodels.api", reason="needs statsmodels, which comes with the extra `dev`")
    generator = np.random.default_rng(num_clusters)
    clusters = np.concatenate([np.arange(num_clusters), generator.integers(0, num_clusters, 200)])
    values = generator.normal(size=num_clusters)[clusters] + generator.random(len(clusters))
    fit = api.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    found = mean_with_error(values, clusters)
    assert found.value == pytest.approx(fit.params[0], rel=1e-12)
    assert found.standard_error == pytest.approx(fit.bse[0], rel=1e-10)
    assert (found.num, found.num_clusters) == (len(values), num_clusters)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=60))
def test_each_instance_its_own_cluster_is_the_closed_form(values: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs scipy, which comes with the extra `helm`")
    found = mean_with_error(values)
    assert found.standard_error == pytest.approx(stats.sem(values), rel=1e-9, abs=1e-9)
    assert found == mean_with_error(values, range(len(values)))


def test_the_error_is_millers_but_for_the_correction() -> None:
    """His: the closed form's variance, and products of deviations of different instances in one cluster, over N squared."""
    generator = np.random.default_rng(3)
    clusters = generator.integers(0, 12, 90)
    values = (generator.random(90) < 0.3 + 0.05 * clusters).astype(float)
    rest = values - values.mean()
    alone = values.var(ddof=0) / 90
    together = sum(rest[i] * rest[j] for i in range(90) for j in range(90) if i != j and clusters[i] == clusters[j]) / 90**2
    error = mean_with_error(values, clusters).standard_error
    assert error is not None
    assert error**2 * 11 / 12 == pytest.approx(alone + together)


def test_clusters_that_agree_count_once() -> None:
    """Copies of ten values say no more than the ten."""
    values = np.random.default_rng(5).random(10)
    copied = mean_with_error(np.repeat(values, 7), np.repeat(np.arange(10), 7))
    assert copied.standard_error == pytest.approx(mean_with_error(values).standard_error)


def test_labels_may_be_text() -> None:
    assert mean_with_error([1, 2, 4], ["b", "a", "b"]) == mean_with_error([1, 2, 4], [7, 1, 7])


def test_one_cluster_and_one_instance_have_no_error() -> None:
    assert mean_with_error([True, False, True, True], [3, 3, 3, 3]) == Mean(0.75, None, 4, 1)
    assert mean_with_error([0.5]) == Mean(0.5, None, 1, 1)


def test_equal_values_have_no_spread() -> None:
    assert mean_with_error([1.0] * 6, [0, 0, 1, 1, 2, 2]) == Mean(1.0, 0.0, 6, 3)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], None, "empty"),
        ([1.0, float("nan")], None, "1 of 2 values of the mean are NaN"),
        ([1.0, float("inf")], None, "infinite"),
        ([[1.0], [2.0]], None, "shape"),
        ([1.0, 2.0], [1], "2 instances"),
        ([1.0, 2.0], [(1, 2), (1, 3)], "labels"),
    ],
)
def test_what_cannot_be_averaged_is_refused(values: list[float], clusters: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_with_error(values, clusters)

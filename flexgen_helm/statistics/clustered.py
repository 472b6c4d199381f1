"""Means with standard errors that know of clusters: questions of one subject, of one passage, of one set of examples.

Source: Miller, Adding Error Bars to Evals (arXiv 2411.00640), the section on clustered standard errors; Liang and Zeger,
Biometrika 73 (1986), for the estimator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from flexgen_helm.statistics.arrays import Labels, checked, numbered


@dataclass(frozen=True)
class Mean:
    """A mean and how much it would differ with other clusters."""

    value: float
    standard_error: float | None
    """None: one cluster, or one instance, says nothing of how clusters differ."""
    num: int
    """Instances."""
    num_clusters: int


def mean_with_error(values: ArrayLike, clusters: Labels | None = None) -> Mean:
    """Return a mean with its cluster-robust standard error.

    The square of the error is ``G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2 / N^2`` with ``G`` clusters. The factor is
    the small-sample correction of statsmodels' ``OLS(x, 1).fit(cov_type="cluster")``. With each instance its own cluster this
    is the closed form ``s / sqrt(N)`` with ``N - 1`` in ``s``. Miller's formula has no factor but the one of the closed form.

    Args:
        values: ``[N]``, numbers or truth values.
        clusters: Cluster of each instance, ``[N]``; None: each instance is its own.

    Returns:
        The mean; its error is None with one cluster, and 0 up to rounding where all values are equal.

    Raises:
        ValueError: For no values, NaN, infinity, or another number of labels.
    """
    array = checked("the mean", values)
    numbers, count = numbered(clusters, len(array))
    mean = float(array.mean())
    sums = np.bincount(numbers, array - mean, count)
    error = None if count < 2 else float(np.sqrt(count / (count - 1) * (sums**2).sum()) / len(array))
    return Mean(mean, error, len(array), count)

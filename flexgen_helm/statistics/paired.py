"""Differences between two evaluations of the same instances.

Most of what makes an instance hard is the same on both sides and falls out of a paired difference. Source: Miller, Adding
Error Bars to Evals (arXiv 2411.00640), the section on paired differences; recovery as in arXiv 2411.02355.
"""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import ArrayLike

from flexgen_helm.statistics.arrays import Labels, checked_pairs, numbered
from flexgen_helm.statistics.bootstrap import Bootstrap, Estimate
from flexgen_helm.statistics.clustered import mean_with_error

PERCENT = 100.0


@dataclass(frozen=True)
class Paired:
    """Mean of ``after - before``; below 0 the score fell."""

    difference: float
    interval: tuple[float, float] | None
    """95 %, by a cluster bootstrap; None: one cluster. Both ends are the difference where all pairs differ by the same."""
    standard_error: float | None
    """Cluster-robust; None: one cluster."""
    num: int
    """Pairs."""
    num_clusters: int
    num_worse: int
    """Pairs of which the score fell."""


def paired_difference(before: ArrayLike, after: ArrayLike, clusters: Labels | None = None) -> Paired:
    """Return the mean difference of pairs with a 95 % interval and a standard error, both over clusters.

    With fewer than about twenty clusters, or about ten pairs that differ, the interval is too narrow; see `flips` for a test
    that is exact there.

    Args:
        before: Scores of the baseline, ``[N]``.
        after: Scores of the same instances in the same order, ``[N]``.
        clusters: Cluster of each instance, ``[N]``; None: each instance is its own.

    Raises:
        ValueError: For no pairs, unequal lengths, NaN or infinity.
    """
    first, second = checked_pairs(before, after)
    numbers, _ = numbered(clusters, len(first))
    mean = mean_with_error(second - first, numbers)
    interval = Bootstrap(numbers).mean(second - first).interval
    return Paired(mean.value, interval, mean.standard_error, mean.num, mean.num_clusters, int((second < first).sum()))


def recovery(before: ArrayLike, after: ArrayLike, clusters: Labels | None = None) -> Estimate | None:
    """Return how much of the baseline's mean score is left, in percent, with a 95 % interval by a cluster bootstrap.

    Args:
        before: Scores of the baseline, ``[N]``.
        after: Scores of the same instances in the same order, ``[N]``.
        clusters: Cluster of each instance, ``[N]``; None: each instance is its own.

    Returns:
        None where the baseline's mean is 0. The interval is None with one cluster, and where the baseline's mean could well
        be 0 (it is in a resample), because the ratio has no bound then.

    Raises:
        ValueError: For no pairs, unequal lengths, NaN or infinity.
    """
    first, second = checked_pairs(before, after)
    numbers, _ = numbered(clusters, len(first))
    found = Bootstrap(numbers).ratio(second, first)
    if found is None or found.interval is None:
        return found and Estimate(PERCENT * found.value, None)
    low, high = found.interval
    return Estimate(PERCENT * found.value, (PERCENT * low, PERCENT * high))

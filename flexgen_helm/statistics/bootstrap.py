"""Estimates with 95 % confidence intervals: percentile bootstrap over groups of positions or instances.

Positions of one text and instances of one subject depend on each other, so whole groups are drawn with replacement. One
estimator object draws once, so that all estimates are made on the same resamples. With fewer than about twenty groups the
intervals are too narrow. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexgen_helm.statistics.arrays import Floats, Labels

RESAMPLES = 1000
SEED = 0
LEVELS = (2.5, 97.5)
"""Percentiles that bound a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    interval: tuple[float, float] | None
    """None: a single group says nothing of how groups differ, or a ratio has no bound."""


class Bootstrap:
    """Draws groups with replacement, always the same draws for the same number of groups."""

    def __init__(self, groups: Labels, *, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        """Draw.

        Args:
            groups: Group of each position, ``[N]``.
            resamples: How often groups are drawn.
            seed: Of the random numbers.
        """
        names, self._group = np.unique(np.asarray(groups), return_inverse=True)
        self._count = len(names)
        generator = np.random.default_rng(seed)
        self._draws = generator.multinomial(self._count, np.full(self._count, 1 / self._count), size=resamples)
        """How often each group was drawn, ``[resamples, groups]``."""

    def mean(
        self, values: Floats, *, where: NDArray[np.bool_] | None = None, after: Callable[[Floats], Floats] = np.asarray
    ) -> Estimate:
        """Estimate a function of the mean over positions.

        Args:
            values: ``[N]``.
            where: Positions that count, ``[N]``; None: all. At least one.
            after: Function of the mean, for each resample.
        """
        mask = np.ones(len(values)) if where is None else where.astype(np.float64)
        sums = np.bincount(self._group, values * mask, self._count)
        counts = np.bincount(self._group, mask, self._count)
        drawn = self._draws @ counts
        resampled = (self._draws @ sums)[drawn > 0] / drawn[drawn > 0]
        return Estimate(float(after(np.asarray(sums.sum() / counts.sum()))), self._interval(after(resampled)))

    def quantile(self, values: Floats, share: float) -> Estimate:
        """Estimate a quantile over positions: the smallest value that at least this share of them does not exceed.

        Args:
            values: ``[N]``.
            share: From 0 to 1.
        """
        order = np.argsort(values, kind="stable")
        ordered, groups = values[order], self._group[order]
        resampled = np.array([ordered[_place(draw[groups], share)] for draw in self._draws])
        return Estimate(float(ordered[_place(np.ones(len(values), dtype=np.int64), share)]), self._interval(resampled))

    def ratio(self, numerator: Floats, denominator: Floats) -> Estimate | None:
        """Estimate the ratio of two means over the same positions.

        Args:
            numerator: ``[N]``.
            denominator: ``[N]``.

        Returns:
            None where the mean of the denominator is 0. The interval is None where it is 0 in a resample or has another sign
            there: then the ratio passes through infinity, and a few percentiles of it bound nothing.
        """
        above, below = (np.bincount(self._group, values, self._count) for values in (numerator, denominator))
        total = below.sum()
        if total == 0:
            return None
        resampled = self._draws @ below
        bounded = bool((np.sign(resampled) == np.sign(total)).all())
        return Estimate(float(above.sum() / total), self._interval(self._draws @ above / resampled) if bounded else None)

    def _interval(self, resampled: Floats) -> tuple[float, float] | None:
        if self._count < 2:
            return None
        low, high = np.percentile(resampled, LEVELS)
        return float(low), float(high)


def _place(weights: NDArray[np.int64], share: float) -> int:
    """Return the first index up to which the weights sum to at least a share of the total."""
    total = np.cumsum(weights)
    return int(np.searchsorted(total, share * total[-1] - 1e-9))

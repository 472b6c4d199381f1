"""Estimates with 95 % confidence intervals: percentile bootstrap over groups of positions.

Positions of one text depend on each other, so whole groups (documents, or windows of one text) are drawn with replacement. One
estimator object draws once, so that all estimates are made on the same resamples. Source: Efron and Tibshirani, An Introduction
to the Bootstrap (1993), chapters 8 and 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
SEED = 0
LEVELS = (2.5, 97.5)
"""Percentiles that bound a 95 % interval."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    interval: tuple[float, float] | None
    """None: a single group says nothing of how groups differ."""


class Bootstrap:
    """Draws groups with replacement, always the same draws for the same number of groups."""

    def __init__(self, groups: Sequence[int] | NDArray[np.int64], *, resamples: int = RESAMPLES, seed: int = SEED) -> None:
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

    def _interval(self, resampled: Floats) -> tuple[float, float] | None:
        if self._count < 2:
            return None
        low, high = np.percentile(resampled, LEVELS)
        return float(low), float(high)


def _place(weights: NDArray[np.int64], share: float) -> int:
    """Return the first index up to which the weights sum to at least a share of the total."""
    total = np.cumsum(weights)
    return int(np.searchsorted(total, share * total[-1] - 1e-9))

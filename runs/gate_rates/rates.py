"""How often a gate on flips fails: simulated with the package's own test, and computed exactly.

The gate fails where the one-sided exact McNemar test, pooled over tasks, is at most its level. A pair loses its answer with
probability ``(disagreement + drop) / 2`` and gains one with ``(disagreement - drop) / 2``; pairs are independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from flexgen_helm.statistics.flips import Flips, flips, pooled

TASKS = 5
"""Tasks of equal size among which pairs are divided."""
RIGHT = 0.6
"""Share of right answers among pairs that agree; the test does not look at it."""


@dataclass(frozen=True)
class Case:
    """What the gate is tried on."""

    pairs: int
    """A multiple of `TASKS`."""
    drop: float
    """True loss of the score, a share."""

    def possible(self, disagreement: float) -> bool:
        """Return whether enough answers change for the score to fall so far."""
        return self.drop <= disagreement


def simulated_rate(case: Case, disagreement: float, level: float, *, datasets: int, generator: np.random.Generator) -> float:
    """Return in which share of simulated data sets the gate fails.

    Args:
        case: Pairs and drop.
        disagreement: Share of the pairs that change, at least the drop.
        level: Of the gate.
        datasets: How many are simulated.
        generator: Of the random numbers.
    """
    return float(np.mean([_simulated(case, disagreement, generator).p_worse <= level for _ in range(datasets)]))


def _simulated(case: Case, disagreement: float, generator: np.random.Generator) -> Flips:
    chance = generator.random(case.pairs)
    lost = chance < (disagreement + case.drop) / 2
    gained = chance >= 1 - (disagreement - case.drop) / 2
    right = generator.random(case.pairs) < RIGHT
    before, after = (right | lost) & ~gained, (right | gained) & ~lost
    return pooled(flips(*task) for task in zip(np.split(before, TASKS), np.split(after, TASKS), strict=True))


def exact_rate(case: Case, disagreement: float, level: float) -> float:
    """Return the probability that the gate fails: a sum over how many pairs change.

    Args:
        case: Pairs and drop.
        disagreement: Share of the pairs that change, at least the drop.
        level: Of the gate.
    """
    if disagreement == 0:
        return 0.0
    changed = np.arange(case.pairs + 1)
    weights = stats.binom.pmf(changed, case.pairs, disagreement)
    changed, weights = changed[weights > 1e-15], weights[weights > 1e-15]
    # isf is the greatest number of lost ones that is not yet an alarm: from the next one on, p is at most the level.
    quiet = stats.binom.isf(level, changed, 0.5)
    return float(weights @ stats.binom.sf(quiet, changed, (disagreement + case.drop) / (2 * disagreement)))


def greatest_disagreement(case: Case, level: float, power: float, *, step: float = 0.0005) -> float | None:
    """Return the greatest disagreement rate up to which the gate catches a drop with this power.

    Args:
        case: Pairs and drop.
        level: Of the gate.
        power: Wanted share of alarms.
        step: Rates that are tried are the drop and this much more each time.

    Returns:
        None where the power is missed even if no answer is gained.
    """
    rate, found = case.drop, None
    while rate <= 1 and exact_rate(case, rate, level) >= power:
        rate, found = rate + step, rate
    return found

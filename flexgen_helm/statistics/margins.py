"""Whether a difference is within a margin, outside of it, or not known well enough to say.

Margins are in the unit of the score; 0.01 is one point of accuracy. Where no pair got worse, resampling shows no loss, however
few the pairs are. Then a margin passes only if so many pairs would have shown a loss of that size: scores from 0 to 1 that fall
by the margin on average fall in at least that share of the pairs, and ``n`` independent pairs all miss it with a probability of
at most ``(1 - margin)^n`` (the rule of three: at 5 %, a margin of ``3 / n``). Sources: Schuirmann, Journal of Pharmacokinetics
and Biopharmaceutics 15 (1987), for two one-sided tests; Hanley and Lippman-Hand, JAMA 249 (1983), for the rule of three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scipy import special

from flexgen_helm.statistics.bootstrap import LEVELS
from flexgen_helm.statistics.paired import Paired

Verdict = Literal["passes", "fails", "inconclusive"]


@dataclass(frozen=True)
class Equivalence:
    """Result of two one-sided tests."""

    verdict: Verdict
    p_value: float | None
    """The larger one of the two tests; None: one cluster."""


def non_inferior(paired: Paired, margin: float) -> Verdict:
    """Judge whether a score fell by less than a margin, by the 95 % interval of the difference: one-sided at 2.5 %.

    Args:
        paired: The difference.
        margin: What may be lost, above 0.

    Returns:
        ``passes`` where the interval lies above ``-margin``, ``fails`` where it lies below, else ``inconclusive``; so is one
        cluster, and no loss among pairs too few to show one.

    Raises:
        ValueError: For a margin that is not above 0.
    """
    _check(margin)
    if paired.interval is None:
        return "inconclusive"
    low, high = paired.interval
    if high < -margin:
        return "fails"
    unseen = paired.num_worse == 0 and _chance_to_miss(paired, margin) > LEVELS[0] / 100
    return "inconclusive" if low <= -margin or unseen else "passes"


def equivalent(paired: Paired, margin: float, *, alpha: float = 0.05) -> Equivalence:
    """Judge whether a score changed by less than a margin either way (TOST), with the standard error over clusters.

    Student's t has one degree of freedom less than there are clusters. With each pair its own cluster this is statsmodels'
    ``ttost_paired``.

    Args:
        paired: The difference.
        margin: What the score may change, above 0.
        alpha: Level of each of the two tests.

    Returns:
        ``passes`` where both tests reject, ``fails`` where the interval of ``1 - 2 alpha`` lies outside of the margins, else
        ``inconclusive``; so is one cluster. Without a pair that differs, p is the chance to have missed a loss of the margin.

    Raises:
        ValueError: For a margin that is not above 0.
    """
    _check(margin)
    if paired.standard_error is None:
        return Equivalence("inconclusive", None)
    distance = margin - abs(paired.difference)
    if paired.standard_error == 0:
        missed = 0.0 if paired.difference else _chance_to_miss(paired, margin)
        inside, outside = (missed, 1.0) if distance > 0 else (1.0, 0.0)
    else:
        statistic = distance / paired.standard_error
        inside, outside = (float(special.stdtr(paired.num_clusters - 1, sign * statistic)) for sign in (-1, 1))
    return Equivalence("passes" if inside <= alpha else "fails" if outside <= alpha else "inconclusive", inside)


def _check(margin: float) -> None:
    if not margin > 0:
        raise ValueError(f"The margin is {margin}; it is what may be lost, so it must be above 0.")


def _chance_to_miss(paired: Paired, margin: float) -> float:
    """Return the greatest probability of no loss among the pairs if the true loss is the margin."""
    return float(max(0.0, 1 - margin) ** paired.num)

"""How small a difference an evaluation could have found, and how many pairs it takes to find one.

All are for a two-sided test; for a one-sided one give twice its level. Source: arXiv 2605.28873 for pairs of right and wrong
answers, Miller (arXiv 2411.00640, power analysis) for a standard error.
"""

from __future__ import annotations

import math

from scipy import special

ALPHA = 0.05
POWER = 0.8


def minimum_detectable_effect(
    disagreement_rate: float, num_pairs: int, *, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """Return the smallest true difference that a test of independent right and wrong answers finds with this power.

    It is ``(z_{alpha/2} + z_beta) * sqrt(rate / pairs)``, a bound from above: the variance of a pair's difference is at most
    the disagreement rate.

    Args:
        disagreement_rate: Share of the pairs of which one side is right and the other wrong.
        num_pairs: At least 1.
        alpha: Level of the two-sided test.
        power: Probability of finding the difference.

    Returns:
        A share, as scores are. One above the rate says that no difference at this rate is found with this power. None where no
        pair disagrees, because then the rate is not known to be 0.

    Raises:
        ValueError: For a rate outside of 0 to 1, no pairs, or a level or power outside of 0 to 1.
    """
    _check_rate(disagreement_rate)
    if num_pairs < 1:
        raise ValueError(f"There are {num_pairs} pairs; at least one is needed.")
    return detectable_by(math.sqrt(disagreement_rate / num_pairs), alpha=alpha, power=power)


def detectable_by(standard_error: float | None, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Return the smallest true difference that is found in spite of a standard error, such as a clustered one.

    Args:
        standard_error: Of the paired difference, in the unit of the score; None where it is not known.
        alpha: Level of the two-sided test.
        power: Probability of finding the difference.

    Returns:
        ``(z_{alpha/2} + z_beta) * standard_error``, in the unit of the score. None where the error is not known or 0, because
        pairs that are all equal do not show how much others would differ.

    Raises:
        ValueError: For a negative error, or a level or power outside of 0 to 1.
    """
    quantiles = _quantiles(alpha, power)
    if standard_error is not None and not standard_error >= 0:
        raise ValueError(f"The standard error is {standard_error}; it cannot be negative.")
    return quantiles * standard_error if standard_error else None


def pairs_needed(effect: float, disagreement_rate: float, *, alpha: float = ALPHA, power: float = POWER) -> int:
    """Return the least number of independent pairs of which `minimum_detectable_effect` is at most this effect.

    Args:
        effect: The true difference, a share; its sign does not matter.
        disagreement_rate: Share of the pairs of which one side is right and the other wrong.
        alpha: Level of the two-sided test.
        power: Probability of finding the difference.

    Raises:
        ValueError: For an effect of 0 or one above the disagreement rate (a score cannot change by more than the answers that
            changed), a rate outside of 0 to 1, or a level or power outside of 0 to 1.
    """
    _check_rate(disagreement_rate)
    if not 0 < abs(effect) <= disagreement_rate:
        raise ValueError(
            f"An effect of {effect} at a disagreement rate of {disagreement_rate} is not possible: it must differ from 0, and "
            "a score cannot change by more than the answers that changed."
        )
    return math.ceil(disagreement_rate * (_quantiles(alpha, power) / effect) ** 2)


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"The disagreement rate is {rate}; it is a share of the pairs, from 0 to 1.")


def _quantiles(alpha: float, power: float) -> float:
    """Return the sum of the normal distribution's quantiles for level and power."""
    if not 0 < alpha < 1 or not 0 < power < 1:
        raise ValueError(f"The level is {alpha} and the power {power}; both must lie between 0 and 1.")
    return float(special.ndtri(1 - alpha / 2) + special.ndtri(power))

"""Where a 95 % interval lies beside a threshold."""

from __future__ import annotations

from scipy import special

from flexgen_helm.statistics.margins import Verdict as Word

WIDTH = float(special.ndtri(0.975))


def above(interval: tuple[float, float], threshold: float) -> Word:
    """Judge a figure that must be at least a threshold."""
    low, high = interval
    return "passes" if low >= threshold else "fails" if high < threshold else "inconclusive"


def below(interval: tuple[float, float], threshold: float) -> Word:
    """Judge a figure that must be at most a threshold."""
    low, high = interval
    return "passes" if high <= threshold else "fails" if low > threshold else "inconclusive"


def of_share(value: float, error: float | None, threshold: float) -> tuple[Word, str]:
    """Judge a mean that must be at most a threshold.

    Args:
        value: The mean, in nats.
        error: Its standard error; None: one cluster.
        threshold: In nats.

    Returns:
        The verdict, and its interval in words.
    """
    if error is None:
        return "inconclusive", f"{value:.3g} nats, one cluster does not show how clusters differ,"
    interval = value - WIDTH * error, value + WIDTH * error
    return below(interval, threshold), f"95 % interval {interval[0]:.3g} to {interval[1]:.3g} nats"

"""Verdicts against margins: statsmodels' TOST, intervals by construction, and what too few pairs must not pass."""

from __future__ import annotations

import numpy as np
import pytest

from flexgen_helm.statistics.margins import Equivalence, equivalent, non_inferior
from flexgen_helm.statistics.paired import Paired, paired_difference

pytest.importorskip("scipy", reason="needs scipy, which comes with the extra `helm`")


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.009, 0.004), "passes"),
        ((-0.01, 0.004), "inconclusive"),
        ((-0.03, -0.01), "inconclusive"),
        ((-0.03, -0.011), "fails"),
        ((-0.03, 0.02), "inconclusive"),
        ((0.01, 0.02), "passes"),
        (None, "inconclusive"),
    ],
)
def test_the_interval_decides(interval: tuple[float, float] | None, verdict: str) -> None:
    assert non_inferior(Paired(-0.01, interval, 0.01, 1000, 1000, 20), 0.01) == verdict


def test_no_loss_passes_only_among_pairs_enough_to_show_one() -> None:
    """A loss of 0.01 stays unseen in 367 pairs with a probability of 0.025012, in 368 with 0.024762."""
    for num, verdict in ((10, "inconclusive"), (367, "inconclusive"), (368, "passes"), (5000, "passes")):
        same = np.ones(num)
        assert non_inferior(paired_difference(same, same), 0.01) == verdict
        better = np.concatenate([np.zeros(num // 2), np.ones(num - num // 2)])
        assert non_inferior(paired_difference(better, same), 0.01) == verdict


@pytest.mark.parametrize("shift", [0.0, -0.02, 0.045, -0.05, 0.2])
@pytest.mark.parametrize("num", [2, 5, 300])
def test_two_one_sided_tests_are_those_of_statsmodels(shift: float, num: int) -> None:
    library = pytest.importorskip("statsmodels.stats.weightstats", reason="needs statsmodels, which comes with the extra `dev`")
    generator = np.random.default_rng(num)
    before = generator.random(num)
    after = before + shift + generator.normal(0, 0.1, num)
    expected, _, _ = library.ttost_paired(after, before, -0.05, 0.05)
    found = equivalent(paired_difference(before, after), 0.05)
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    assert (found.verdict == "passes") == (expected <= 0.05)


def test_an_interval_outside_of_the_margins_fails() -> None:
    """The 90 % interval of 101 pairs is 1.660 standard errors to each side."""
    for difference, verdict in ((-0.0677, "fails"), (-0.0655, "inconclusive"), (-0.0333, "passes"), (0.0677, "fails")):
        paired = Paired(difference, None, 0.01, 101, 101, 50)
        assert equivalent(paired, 0.05).verdict == verdict


def test_clusters_take_degrees_of_freedom() -> None:
    """Four clusters: Student's t with 3 degrees of freedom exceeds 2.353 with a probability of 5 % (printed tables)."""
    assert equivalent(Paired(0.0, None, 0.01, 400, 4, 50), 0.02353).p_value == pytest.approx(0.05, abs=2e-4)


def test_pairs_without_spread() -> None:
    same, one = np.ones(50), Paired(-0.5, None, None, 2, 1, 1)
    assert equivalent(one, 0.9) == Equivalence("inconclusive", None)
    for margin, verdict in ((0.01, "inconclusive"), (0.1, "passes")):
        found = equivalent(paired_difference(same, same), margin)
        assert found.verdict == verdict
        assert found.p_value == pytest.approx((1 - margin) ** 50)
    assert equivalent(paired_difference(same, same), 2.0) == Equivalence("passes", 0.0)
    assert equivalent(paired_difference(same, same / 2), 0.1) == Equivalence("fails", 1.0)
    assert equivalent(paired_difference(same, same / 2), 0.6) == Equivalence("passes", 0.0)


@pytest.mark.parametrize("margin", [0.0, -0.01, float("nan")])
def test_a_margin_is_above_zero(margin: float) -> None:
    paired = paired_difference([1, 0], [1, 1])
    with pytest.raises(ValueError, match="margin"):
        non_inferior(paired, margin)
    with pytest.raises(ValueError, match="margin"):
        equivalent(paired, margin)

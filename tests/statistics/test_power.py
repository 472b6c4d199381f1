"""Minimum detectable effects against published figures and statsmodels' power of the z test."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.statistics.power import detectable_by, minimum_detectable_effect, pairs_needed

pytest.importorskip("scipy", reason="needs scipy, which comes with the extra `helm`")


@pytest.mark.parametrize(("num_pairs", "points"), [(100, 6.3), (514, 2.8), (14_042, 0.53)])
def test_published_figures(num_pairs: int, points: float) -> None:
    """ArXiv 2605.28873: 5 % of the pairs disagree, power of 80 %; MMLU in HELM Lite has 514 instances, all of it 14,042."""
    found = minimum_detectable_effect(0.05, num_pairs)
    assert found is not None
    assert 100 * found == pytest.approx(points, rel=0.02)


@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.8), (0.01, 0.9), (0.02, 0.95)])
def test_the_z_test_of_statsmodels_has_this_power(alpha: float, power: float) -> None:
    """Of one sample; the other tail, which it counts too, is below 1e-5."""
    library = pytest.importorskip("statsmodels.stats.power", reason="needs statsmodels, which comes with the extra `dev`")
    effect = minimum_detectable_effect(0.04, 700, alpha=alpha, power=power)
    assert effect is not None
    found = library.NormalIndPower().power(effect / math.sqrt(0.04), 700, alpha, ratio=0)
    assert found == pytest.approx(power, abs=1e-4)


def test_a_standard_error_gives_the_same_as_its_rate() -> None:
    assert detectable_by(math.sqrt(0.05 / 514)) == minimum_detectable_effect(0.05, 514)
    assert detectable_by(1.0) == pytest.approx(1.959964 + 0.841621, abs=1e-6)


def test_what_shows_no_spread_has_no_detectable_effect() -> None:
    assert minimum_detectable_effect(0.0, 100) is None
    assert detectable_by(0.0) is None
    assert detectable_by(None) is None


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1), st.floats(0.01, 1), st.floats(0.001, 0.2), st.floats(0.5, 0.99))
def test_pairs_needed_are_the_fewest(rate: float, share: float, alpha: float, power: float) -> None:
    effect = -share * rate
    needed = pairs_needed(effect, rate, alpha=alpha, power=power)
    enough = minimum_detectable_effect(rate, needed, alpha=alpha, power=power)
    assert enough is not None
    assert enough <= -effect * (1 + 1e-9)
    if needed > 1:
        fewer = minimum_detectable_effect(rate, needed - 1, alpha=alpha, power=power)
        assert fewer is not None
        assert fewer > -effect * (1 - 1e-9)


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="not possible"):
        pairs_needed(0.06, 0.05)
    with pytest.raises(ValueError, match="not possible"):
        pairs_needed(0.0, 0.05)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="disagreement rate"):
            minimum_detectable_effect(rate, 10)
    with pytest.raises(ValueError, match="0 pairs"):
        minimum_detectable_effect(0.1, 0)
    with pytest.raises(ValueError, match="level"):
        minimum_detectable_effect(0.1, 10, alpha=0)
    with pytest.raises(ValueError, match="power"):
        detectable_by(None, power=1)
    with pytest.raises(ValueError, match="negative"):
        detectable_by(-1.0)

"""Each gate's three verdicts, with figures that can be computed by hand or by SciPy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from flexgen_helm.gate.config import SPECS
from flexgen_helm.gate.gates import GATES
from flexgen_helm.gate.intervals import above, below
from flexgen_helm.reports.fidelity_results import FidelityResult
from tests.gate.made import W4, One, Pair, engine, scored


def test_every_gate_has_a_specification() -> None:
    assert list(GATES) == list(SPECS)


def test_flips_are_judged_by_the_exact_test() -> None:
    before = [1.0] * 300 + [0.0] * 100
    lost, gained = 14, 2
    after = [0.0] * lost + [1.0] * (300 - lost) + [1.0] * gained + [0.0] * (100 - gained)
    found = Pair(scored(before), scored(after)).judge("flips")
    expected = binomtest(lost, lost + gained, 0.5, alternative="greater").pvalue
    assert found.word == "fails"
    assert found.value == pytest.approx(expected)
    assert "14 answers lost and 2 gained of 400" in found.reason
    # 2.326 and 0.842: quantiles of the normal distribution at 99 and 80 %
    assert found.effect == pytest.approx((2.326 + 0.842) * math.sqrt(16 / 400 / 400), rel=1e-3)


def test_flips_without_any_say_what_they_could_have_seen() -> None:
    few = Pair(scored([1, 0] * 50), scored([1, 0] * 50)).judge("flips")
    assert (few.word, few.value) == ("inconclusive", 1.0)
    # 2^-7 < 1 % < 2^-6: seven losses and no gain are the fewest that are significant.
    assert few.effect is not None
    assert binom.sf(6, 100, few.effect) == pytest.approx(0.8)
    many = Pair(scored([1, 0] * 500), scored([1, 0] * 500)).judge("flips")
    assert many.word == "passes"
    assert Pair(scored([1] * 6), scored([1] * 6)).judge("flips").effect is None


@pytest.mark.parametrize(("lost", "word"), [(0, "passes"), (40, "fails"), (10, "inconclusive")])
def test_margin(lost: int, word: str) -> None:
    before, after = [1.0] * 1000, [0.0] * lost + [1.0] * (1000 - lost)
    found = Pair(scored(before), scored(after)).judge("margin")
    assert found.word == word
    assert found.value == pytest.approx(-lost / 1000)


def test_margin_of_few_answers_says_which_loss_would_have_shown() -> None:
    found = Pair(scored([1] * 20), scored([1] * 20)).judge("margin")
    assert found.word == "inconclusive"
    assert found.effect is not None
    assert (1 - found.effect) ** 20 == pytest.approx(0.025)
    assert "too few" in found.reason


@pytest.mark.parametrize(("lost", "word"), [(0, "passes"), (40, "fails"), (10, "inconclusive")])
def test_recovery_names_both_targets_of_mlperf(lost: int, word: str) -> None:
    before, after = [1.0] * 1000, [0.0] * lost + [1.0] * (1000 - lost)
    found = Pair(scored(before), scored(after)).judge("recovery")
    assert found.word == word
    assert found.value == pytest.approx(100 - lost / 10)
    assert ("meets" if lost <= 10 else "misses") + " MLPerf's 99 %" in found.reason
    assert ("misses" if lost else "meets") + " MLPerf's 99.9 %" in found.reason


def test_recovery_of_nothing_is_not_decided() -> None:
    assert Pair(scored([0] * 9), scored([1] * 9)).judge("recovery").word == "inconclusive"


def test_lower_is_better() -> None:
    generator = np.random.default_rng(0)
    before = 1 + generator.random(600)
    worse = Pair(scored(before.tolist()), scored((before * 1.1).tolist()), lower_is_better=True)
    for gate in ("flips", "margin", "recovery"):
        assert worse.judge(gate).word == "fails", gate
    assert worse.judge("recovery").value == pytest.approx(100 / 1.1)
    assert (
        Pair(scored(before.tolist()), scored((before / 1.1).tolist()), lower_is_better=True).judge("recovery").word == "passes"
    )


def test_no_scores_are_not_decided() -> None:
    nothing = Pair(scored([math.nan] * 5), scored([math.nan] * 5))
    for gate in ("flips", "margin", "recovery"):
        found = nothing.judge(gate)
        assert (found.word, found.value) == ("inconclusive", None)


def choices(logprobs: np.ndarray) -> list[One]:
    return [One(logprob=value, text="") for value in logprobs]


@pytest.mark.parametrize(
    ("shift", "noise", "word"), [(0.0, 0.0, "passes"), (-0.1, 0.1, "fails"), (-0.001, 0.5, "inconclusive")]
)
def test_log_probability_of_the_right_answer(shift: float, noise: float, word: str) -> None:
    before = -np.linspace(1, 5, 100)
    change = shift + noise * np.random.default_rng(1).standard_normal(100)
    found = Pair(choices(before), choices(before + change)).judge("logprob", 0.02)
    assert found.word == word
    assert found.value == pytest.approx(change.mean(), abs=1e-12)


@pytest.mark.parametrize(("noise", "word"), [(0.0, "passes"), (0.2, "fails"), (0.1, "inconclusive")])
def test_spread_sees_what_leaves_the_mean_where_it_was(noise: float, word: str) -> None:
    before = -np.linspace(1, 5, 100)
    change = noise * np.concatenate([np.linspace(0, 2, 50), -np.linspace(0, 2, 50)])  # mean 0, mean size `noise`
    pair = Pair(choices(before), choices(before + change))
    found = pair.judge("logprob_spread", 0.1)
    assert found.word == word
    assert found.value == pytest.approx(noise, abs=1e-12)


def test_default_thresholds_follow_what_changed() -> None:
    ones = choices(-np.linspace(1, 5, 50))
    w4 = engine(W4, scheme="w4")
    w8 = engine("flexgen/org/model@w8", scheme="w8", bits_per_compressed_weight=8.25)
    bfloat = engine(BASE_BFLOAT, scheme="plain")
    other_rows = engine(numerics={**engine().numerics, "rows": {"kind": "single"}})
    limits = {}
    for name, served in (("low-bit", w4), ("8-bit", w8), ("same", other_rows), ("16-bit", _in_bfloat16(bfloat))):
        found = Pair(ones, ones, (engine(), served)).judge("logprob_spread")
        limits[name] = found.threshold
    assert limits == SPECS["logprob_spread"].threshold
    unknown = Pair(ones, ones, (None, None)).judge("logprob_spread")
    assert unknown.word == "inconclusive"
    assert "name a threshold" in unknown.reason


BASE_BFLOAT = "flexgen/org/model"


def _in_bfloat16(served: Any) -> Any:
    weights = {**served.numerics["weights"], "dtype": "bfloat16"}
    return engine(numerics={**served.numerics, "weights": weights})


def fidelity(kl: tuple[float, float, float], top1: tuple[float, float, float]) -> FidelityResult:
    content = {
        "text": {"positions": 1000, "source": "text"},
        "kl": {"mean": kl[0]},
        "top1_agreement": top1[0],
        "ci95": {"kl": {"mean": kl[1:]}, "top1_agreement": top1[1:]},
    }
    return FidelityResult(Path("x.json"), content)


@pytest.mark.parametrize(
    ("kl", "top1", "word"),
    [
        ((0.01, 0.009, 0.011), (0.99, 0.98, 1.0), "passes"),
        ((0.05, 0.04, 0.06), (0.95, 0.94, 0.96), "inconclusive"),
        ((0.5, 0.4, 0.6), (0.7, 0.6, 0.8), "fails"),
    ],
)
def test_fidelity(kl: tuple[float, float, float], top1: tuple[float, float, float], word: str) -> None:
    pair = Pair(scored([1]), scored([1]), fidelity=fidelity(kl, top1))
    assert (pair.judge("kl", 0.05).word, pair.judge("kl", 0.05).value) == (word, kl[0])
    assert (pair.judge("top1", 0.95).word, pair.judge("top1", 0.95).value) == (word, top1[0])


def test_no_fidelity_is_not_decided() -> None:
    found = Pair(scored([1]), scored([1])).judge("kl")
    assert (found.word, found.value) == ("inconclusive", None)
    assert "flexgen-helm fidelity" in found.reason


@pytest.mark.parametrize(("tokens", "word"), [((10, 10), "passes"), ((5, 6), "fails"), ((0, 18), "inconclusive")])
def test_length(tokens: tuple[float, float], word: str) -> None:
    before = [One(tokens=10)] * 40
    after = [One(tokens=tokens[0])] * 20 + [One(tokens=tokens[1])] * 20
    found = Pair(before, after).judge("length")
    assert found.word == word
    assert found.value == pytest.approx(sum(tokens) / 20)


@pytest.mark.parametrize(("lost", "word"), [(0, "passes"), (80, "fails"), (10, "inconclusive")])
def test_unparsable(lost: int, word: str) -> None:
    after = [One(parsable=0)] * lost + [One()] * (1000 - lost)
    found = Pair([One()] * 1000, after).judge("unparsable")
    assert found.word == word
    assert found.value == pytest.approx(lost / 1000)


def speed(tokens: int, **changes: Any) -> Any:
    stats = {"prompt_tokens_computed": tokens, "generated_tokens": 0, "seconds": 2.0}
    return engine(measured={"date": "2026", "stats": stats}, **changes)


def test_throughput() -> None:
    ones = scored([1, 0])
    for tokens, word in ((1000, "passes"), (899, "fails")):
        found = Pair(ones, ones, (speed(1000), speed(tokens))).judge("throughput")
        assert (found.word, found.value) == (word, tokens / 1000)
    other = {**engine().environment, "threads": 8}
    for served in (speed(1000, environment=other), engine(measured=None), None):
        assert Pair(ones, ones, (speed(1000), served)).judge("throughput").word == "inconclusive"


def test_intervals_at_their_ends() -> None:
    assert [above(x, 1.0) for x in ((1.0, 2.0), (0.5, 1.0), (0.0, 0.9))] == ["passes", "inconclusive", "fails"]
    assert [below(x, 1.0) for x in ((0.0, 1.0), (1.0, 1.5), (1.1, 2.0))] == ["passes", "inconclusive", "fails"]

"""Rates of the gate: the simulation against the exact sum, and the sum against counting by hand."""

from __future__ import annotations

import json
import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest

from flexgen_helm.runs.gate_rates.__main__ import main
from flexgen_helm.runs.gate_rates.rates import Case, exact_rate, greatest_disagreement, simulated_rate

pytest.importorskip("scipy", reason="needs scipy, which comes with the extra `helm`")


def counted(case: Case, disagreement: float, level: float) -> float:
    """The probability of an alarm, over all numbers of lost and gained answers, in integers and products."""
    up, down = (disagreement - case.drop) / 2, (disagreement + case.drop) / 2
    total = 0.0
    for lost in range(case.pairs + 1):
        for gained in range(case.pairs + 1 - lost):
            changed = lost + gained
            p = sum(comb(changed, k) for k in range(lost, changed + 1)) / 2**changed
            if p <= level:
                ways = comb(case.pairs, changed) * comb(changed, lost)
                total += ways * down**lost * up**gained * (1 - disagreement) ** (case.pairs - changed)
    return total


@pytest.mark.parametrize(
    ("drop", "disagreement", "level"), [(0.0, 0.2, 0.05), (0.1, 0.3, 0.01), (0.2, 0.2, 0.05), (0.0, 0.0, 0.5)]
)
def test_the_exact_rate_counts_all_outcomes(drop: float, disagreement: float, level: float) -> None:
    case = Case(40, drop)
    assert exact_rate(case, disagreement, level) == pytest.approx(counted(case, disagreement, level), rel=1e-9)


@pytest.mark.parametrize("case", [Case(500, 0.0), Case(500, 0.02), Case(1000, 0.01)])
def test_the_simulation_agrees_with_the_exact_rate(case: Case) -> None:
    """Within four deviations of a share of 600."""
    expected = exact_rate(case, 0.05, 0.05)
    found = simulated_rate(case, 0.05, 0.05, datasets=600, generator=np.random.default_rng(3))
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 600) ** 0.5)


@pytest.mark.parametrize("level", [0.01, 0.05])
@pytest.mark.parametrize("pairs", [5, 500, 10_000])
def test_no_drop_raises_no_more_false_alarms_than_the_level(pairs: int, level: float) -> None:
    """Given how many answers changed, the exact test rejects with at most its level; so does any mixture of such numbers."""
    for disagreement in (0.0, 0.001, 0.01, 0.1, 1.0):
        assert exact_rate(Case(pairs, 0.0), disagreement, level) <= level


def test_a_drop_is_caught_up_to_the_rate_that_is_named() -> None:
    case = Case(10_000, 0.005)
    greatest = greatest_disagreement(case, 0.01, 0.8)
    assert greatest is not None
    assert exact_rate(case, greatest, 0.01) >= 0.8 > exact_rate(case, greatest + 0.0005, 0.01)
    assert greatest_disagreement(Case(500, 0.02), 0.01, 0.95) is None


def test_the_command_prints_a_table_and_what_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["gate_rates", "--levels", "0.02", "--datasets", "2", "--json", str(tmp_path / "rates.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert main() == 0
    printed = capsys.readouterr().out
    assert "| 2.0% | 0.0% | 0.0% (0.00%) | 0.0% (0.00%) | impossible | impossible |" in printed
    assert "2 points, 500 pairs: caught at 95% at no disagreement rate" in printed
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert {rate["level"] for rate in rates} == {0.02}
    assert all(rate["case"]["drop"] <= rate["disagreement"] for rate in rates)

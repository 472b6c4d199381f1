"""The table of simulated scaling: what stands in it, and where the paper's figures are."""

from __future__ import annotations

import pytest

from flexgen_helm.policy.planner.pipeline.network import NO_NETWORK
from flexgen_helm.runs.scale_out.__main__ import PAPER, Line, predict, table


def test_the_papers_figures_stand_beside_the_simulated_ones() -> None:
    name = "facebook/opt-30b"
    lines = [
        Line(name, "t4", count, speed, "stage 0 device", 0.5, "sizes", PAPER.get((name, "t4", count)))
        for count, speed in ((1, 8.0), (4, 30.0), (16, 100.0))
    ]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(lines)[2:]]
    # Table 3 of the paper: 7.32 and 23.61 tokens/s.
    assert [row[3:7] for row in rows] == [
        ["8.00", "1.00", "7.32", "1.00"],
        ["30.00", "3.75", "23.61", "3.23"],
        ["100.00", "12.50", "-", "-"],
    ]


def test_what_does_not_fit_is_said() -> None:
    row = table([Line("m", "t4", 1, refused="too large"), Line("m", "t4", 4, 3.0)])[2:]
    assert "| does not fit | - |" in row[0]
    assert "| 3.00 | - |" in row[1]


def test_a_line_is_predicted_for_a_model_and_a_machine() -> None:
    line = predict("facebook/opt-125m", "t4", 2, NO_NETWORK, jobs=2, numerics=False)
    assert (line.stages, line.refused) == (2, "")
    assert line.tokens_per_second > 0
    assert 0 < line.utilisation <= 1
    assert line.policy.startswith("2 x ")


def test_more_stages_than_layers_are_refused_with_the_reason() -> None:
    line = predict("facebook/opt-125m", "t4", 13, NO_NETWORK, jobs=1, numerics=False)
    assert "12 layers cannot be divided into 13 stages" in line.refused
    assert line.tokens_per_second == pytest.approx(0.0)

"""The run that shows everything at once, with a tiny model: its steps, and from nothing to a verdict."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.evaluation.suites import find_suite
from flexgen_helm.runs.accuracy_vs_compression.steps import Study
from flexgen_helm.runs.end_to_end.__main__ import SUITE, main, steps
from tests.reports.synthetic import Answer, Suite
from tests.runs.test_accuracy_vs_compression import study

__all__ = ["study"]


def test_each_evaluation_is_followed_by_its_prediction_and_the_gate_comes_last(study: Study) -> None:
    titles = [step.title for step in steps(replace(study, variants=("w8", "w4kv4s10"), fidelity_tokens=0))]
    assert titles == [
        *("evaluate 16 bits", "predicted and measured: 16 bits"),
        *("evaluate w8", "predicted and measured: w8"),
        *("evaluate w4kv4s10", "predicted and measured: w4kv4s10"),
        *("report", "gate"),
    ]


def test_the_suite_asks_in_three_ways() -> None:
    assert [entry.partition(":")[0] for entry in find_suite(SUITE).entries] == ["mmlu", "lambada", "perplexity"]


@pytest.mark.parametrize(("right", "status", "words"), [(1.0, 0, "it passes"), (0.0, 1, "a regression")])
def test_what_the_gate_finds_is_said_and_is_no_failure(
    study: Study, capfd: pytest.CaptureFixture[str], right: float, status: int, words: str
) -> None:
    study = replace(study, fidelity_tokens=0)
    for variant, score in ((None, 1.0), (study.variants[0], right)):
        evaluation = study.evaluation(variant)
        Suite(evaluation.suite_folder, evaluation.deployment).run("mmlu_subject=x", [Answer(score=score)] * 40)
    *_, gate = steps(study)
    assert gate.do() == 0
    assert f"The gate says: {words}" in capfd.readouterr().out
    assert json.loads((study.out / "gate.json").read_text())["status"] == status


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_nothing_to_a_verdict_and_again(
    study: Study, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", study.model, "--suite", study.suite, "--out", str(study.out), "-m", "3"]
    arguments += ["--variant", "w3-minmax", "--max-memory", "device=1GiB,host=1GiB", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["end_to_end", *arguments])
    for again in (False, True):
        assert main() == 0
        printed, complaint = capfd.readouterr()
        assert printed.count("done before") == (2 if again else 0)
        assert "was not predicted" in complaint  # so small a model fits
        assert (study.out / "report" / "report.html").is_file()
        said = next(line for line in printed.splitlines() if line.startswith("The gate says: "))
        (candidate,) = json.loads((study.out / "gate.json").read_text())["candidates"]
        assert candidate["verdicts"]
        assert said.endswith(f"verdicts in {study.out / 'gate.json'}")

"""The comparison of predictions with measurements, and of `auto` with the default, on a tiny model and made-up figures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_helm.errors import FlexGenError
from flexgen_helm.machine.profile import LayerTime, MachineProfile, ProcessorSeconds, Rate, UnpackRate
from flexgen_helm.machine.profile_file import named_profile
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.runs.policy_validation import __main__ as command
from flexgen_helm.runs.policy_validation import matrix
from flexgen_helm.runs.policy_validation.cases import CASES, Sizes
from flexgen_helm.runs.policy_validation.matrix import Cell
from flexgen_helm.runs.policy_validation.measuring import Outcome, Run, outcome_of
from flexgen_helm.runs.policy_validation.peaks import Peaks, peaks_alone
from flexgen_helm.runs.policy_validation.rates import difference, measured_form, middle, sharing
from flexgen_helm.runs.policy_validation.report import are_close, peaks_table, summary
from tests.models import save_tiny
from tests.policy.planner.made import policy_with

LAPTOP = named_profile("laptop-8gib")
OUTCOME = Outcome("a", 11.0, 10.0, 3.0, 4.0, "device", {}, {}, {}, {}, 0, True)


def _profile(seconds: float, rate: float) -> MachineProfile:
    layer = LayerTime("m", "bfloat16", "decode", 16, seconds, processor=ProcessorSeconds(seconds / 2, 0.0, 0.0))
    unpack = (UnpackRate("device", "w4", Rate(rate)),)
    return replace(LAPTOP, layers=(layer,), unpack=unpack, disk_read=Rate(rate))


@pytest.mark.slow
def test_a_tiny_model_is_predicted_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with its own clock: sums of busy seconds cannot exceed the run's time, and every job is computed."""
    monkeypatch.setattr(command, "machine_profile", lambda device, **options: LAPTOP)
    file, plot = tmp_path / "found.json", tmp_path / "plot.png"
    sizes = ["--prompts", "4", "--prompt-len", "12", "--new-tokens", "3", "--long-prompt-len", "20"]
    names = ["--policies", "RAM, small", "disk, lossless, scoring"]
    model = ["--model", str(save_tiny("llama", tmp_path)), "--runs", "1", "--tries", "1", "--quiet"]
    monkeypatch.setattr(sys, "argv", ["x", *sizes, *names, *model, "--json", str(file), "--plot", str(plot)])
    assert command.main() in (0, 1)
    found = json.loads(file.read_text(encoding="utf-8"))
    ram, disk = found["policies"]
    assert (ram["name"], disk["name"]) == ("RAM, small blocks", "disk, lossless, scoring")
    for each in (ram, disk):
        assert each["predicted_seconds"] > 0
        assert each["predicted_processor"] > 0
        assert 0 < each["measured_busy"]["device"] <= each["measured_seconds"]
        assert each["measured_processor"] > 0
    assert disk["predicted_busy"]["disk_read"] > 0
    assert disk["measured_busy"]["disk_read"] > 0
    assert not ram["measured_busy"].get("disk_read")
    for each in (ram, disk):  # in processes of their own, which hold at least the weights
        assert each["measured_peaks"]["host"] > 0
        assert each["predicted_peaks"].keys() == each["measured_peaks"].keys()
    assert plot.stat().st_size > 0


@pytest.mark.parametrize(("predicted", "close"), [(99, False), (100, True), (110, True), (111, False)])
def test_a_peak_is_close_if_it_is_never_below_and_a_tenth_above_at_most(predicted: int, close: bool) -> None:
    assert are_close(Peaks({"host": predicted, "disk": 0}, {"host": 100, "disk": 0})) == close


def test_the_table_of_peaks_has_the_tiers_that_hold_something() -> None:
    table = peaks_table({"a": Peaks({"host": 3 * 2**20, "disk": 0}, {"host": 2 * 2**20, "disk": 0})})
    assert table.splitlines()[2:] == ["| a | host | 3.0 | 2.0 | 1.500 |"]


def test_a_process_that_fails_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FlexGenError, match=r"The peak of 'RAM, scoring' could not be measured \(status 1\)"):
        peaks_alone(["--model", "/no/such/model"], "RAM, scoring")
    assert "/no/such/model" in capfd.readouterr().err


def test_jobs_are_those_of_the_work() -> None:
    sizes = Sizes(num_prompts=8, prompt_len=5, new_tokens=3, long_prompt_len=50)
    by_work = {case.work: case.jobs(sizes, 100) for case in CASES}
    assert {work: [len(jobs), len(jobs[0].token_ids or ())] for work, jobs in by_work.items()} == {
        "generate": [8, 5],
        "score": [8, 5],
        "long": [2, 50],
    }
    assert by_work["score"][0].score_prompt
    assert by_work["generate"][0].max_new_tokens == 3


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(FlexGenError, match="No policy is named 'tape'"):
        command.chosen(["disk", "tape"])


def test_profiles_around_a_run_are_compared_and_averaged() -> None:
    before, after = _profile(1.0, 100.0), _profile(1.2, 50.0)
    assert difference(before, after, "device") == pytest.approx(0.2)
    assert difference(before, after, "unpack") == pytest.approx(1.0)
    assert difference(before, after, "disk_read") == pytest.approx(1.0)
    assert sharing(before) == pytest.approx(1.0)  # half of the time goes to others
    assert sharing(LAPTOP) == 0
    made = middle(before, after)
    assert made.layers[0].seconds == pytest.approx(1.1)
    assert made.layers[0].processor is not None
    assert made.layers[0].processor.seconds == pytest.approx(0.55)
    # Half the bytes take 1/200 s, the others 1/100 s.
    assert made.unpack[0].rate.value == pytest.approx(200 / 3)
    assert made.disk_read is not None
    assert made.disk_read.value == pytest.approx(200 / 3)


def test_a_form_has_the_rate_of_the_longest_measured_name() -> None:
    assert [measured_form(form) for form in ("w4", "w4-entropy", "w4-self", "lossless")] == [
        "w4",
        "w4-entropy",
        "w4",
        "lossless",
    ]


def test_the_summary_counts_processor_time_where_the_machine_was_not_steady() -> None:
    others = [
        replace(OUTCOME, predicted_seconds=20.0, measured_seconds=25.0),
        replace(OUTCOME, predicted_processor=30.0, measured_processor=30.0, discarded=3, steady=False),
    ]
    found = summary([OUTCOME, *others])
    assert found.median_error == pytest.approx(0.1)
    assert found.worst_error == pytest.approx(0.2)
    assert found.rank_correlation == pytest.approx(1.0)
    assert (found.by_processor, found.discarded) == (1, 3)
    turned = [replace(OUTCOME, predicted_seconds=predicted) for predicted in (2.0, 1.0, 3.0)]
    measured = [replace(each, measured_seconds=i) for i, each in enumerate(turned, 1)]
    assert summary(measured).rank_correlation == pytest.approx(0.5)  # 1 - 6 * (1 + 1 + 0) / (3 * 8)


def test_a_policy_has_the_means_of_the_runs_that_count() -> None:
    predicted = Prediction(policy_with(), 4.0, 8, 2, 1, {}, {}, {}, {"device": 3.0}, 1.0)
    steady = [Run(predicted, 2.0, seconds, 1.0, {"device": seconds / 2}, steady=True) for seconds in (3.0, 5.0)]
    crowded = Run(predicted, 2.0, 90.0, 6.0, {"device": 9.0}, steady=False)
    found = outcome_of("a", [*steady, crowded], Peaks({}, {}))
    assert (found.decisive, found.discarded) == ((4.0, 4.0), 1)
    assert found.measured_busy == {"device": 2.0}
    found = outcome_of("a", [crowded, crowded], Peaks({}, {}))
    assert (found.decisive, found.discarded) == ((2.0, 6.0), 2)


def test_the_matrix_compares_both_policies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(matrix, "MACHINES", {"laptop-8gib": (("facebook/opt-1.3b", "2GiB"),)})
    short = matrix.Workload.uniform(8, 16, 4)
    monkeypatch.setattr(matrix, "WORKLOADS", {"short": short})
    assert matrix.run_matrix(None, None) == 0
    assert "| laptop-8gib | opt-1.3b | 2GiB | short |" in capsys.readouterr().out
    with pytest.raises(FlexGenError, match="no machine 'tape'"):
        matrix.run_matrix(["tape"], None)


@pytest.mark.parametrize(("auto", "status"), [(10.2, 0), (10.4, 1), (5.0, 0)])
def test_the_matrix_fails_where_auto_is_slower(auto: float, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "cells", lambda machines: iter([Cell("m", "x", "1GiB", "w", 10.0, auto)]))
    assert matrix.run_matrix(None, None) == status

"""The benchmark in other harnesses, as far as it needs none; its sides are tested in tests/harnesses."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.harness_benchmark import __main__ as command
from flexgen_helm.runs.harness_benchmark import questions
from flexgen_helm.runs.harness_benchmark.report import Measured, as_dict, render
from flexgen_helm.runs.harness_benchmark.sides.measure import measure
from flexgen_helm.runs.harness_benchmark.sides.way import Outcome

OURS = Measured(1.0, 0.5, [[-1.0, -2.0], [-3.0, -4.0]], [5.0, 1.0, 3.0], [4.0, 2.0, 3.0], "one workload", {})
THEIRS = Measured(2.0, 0.5, [[-1.0, -2.25], [-3.0, -4.0]], [9.0], [12.0], "batches of 4", {"batches of 4": [3.0, 4.0]})


def test_a_table_has_medians_ratios_and_the_largest_difference() -> None:
    lines = render("title", {"flexgen": OURS, "hf": THEIRS})
    assert lines[0] == "title"
    assert lines[2].split() == ["flexgen", "3.0", "3.0", "1.00", "0.5000", "1.0", "one", "workload"]
    assert lines[3].split() == ["hf", "12.0", "9.0", "4.00", "0.5000", "2.0", "batches", "of", "4"]
    assert lines[4].endswith("batches of 4 3.0 (4.0)")
    assert lines[5].endswith("log-probability: 2.5e-01")


def test_texts_that_differ_are_counted_and_a_failure_is_a_line() -> None:
    one, other = (Measured(1.0, 0.5, answers, [1.0], [1.0], "", {}) for answers in (["A", "B"], ["A", "C"]))
    assert render("title", {"flexgen": one, "hf": other})[-1].endswith("1 of 2")
    entries = {"flexgen": OURS, "hf": "status 1: out of memory"}
    assert "failed: status 1: out of memory" in render("title", entries)[3]
    assert as_dict(entries)["hf"] == {"failed": "status 1: out of memory"}


def test_the_way_that_takes_least_for_the_first_questions_is_measured() -> None:
    asked: list[tuple[str, int]] = []

    def way(name: str, loops: int) -> Outcome:
        return Outcome(float(sum(range(loops)) > 0), [name])

    def slow(count: int) -> Outcome:
        asked.append(("slow", count))
        return way("slow", 3_000_000)

    def fast(count: int) -> Outcome:
        asked.append(("fast", count))
        return way("fast", 10)

    found = measure({"slow": slow, "fast": fast}, count=9, sample=4, repeats=2)
    assert (found["setting"], found["answers"], len(found["wall_s"])) == ("fast", ["fast"], 2)
    assert asked == [("slow", 2), ("slow", 4), ("fast", 2), ("fast", 4), ("fast", 9), ("fast", 9)]


def test_prompts_hold_five_examples_and_end_before_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("dev", "test"):
        folder = tmp_path / "mmlu" / "data" / split
        folder.mkdir(parents=True)
        rows = [[f"{split} {i}?", "one", "two", "three", "four", "ABCD"[i % 4]] for i in range(7)]
        with (folder / f"letters_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    monkeypatch.setattr(questions, "helm_data_folders", lambda: [tmp_path / "other", tmp_path])
    assert questions.write_questions(tmp_path / "q.jsonl", "letters", 3) == 3
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [0, 1, 2]
    for i, line in enumerate(lines):
        assert line["prompt"].endswith(f"test {i}?\nA. one\nB. two\nC. three\nD. four\nAnswer:")
        assert line["prompt"].count("dev ") == 5
        assert "dev 1?\nA. one\nB. two\nC. three\nD. four\nAnswer: B\n\n" in line["prompt"]
    with pytest.raises(FlexGenError, match=r"no subject 'digits'. Its subjects are letters"):
        questions.write_questions(tmp_path / "q.jsonl", "digits", 3)


def test_a_harness_that_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.interpreters(command.parse(["--lm-eval", sys.executable])) == {"lm_eval": sys.executable}
    assert "--inspect" in capsys.readouterr().out
    with pytest.raises(FlexGenError, match="make test-harnesses"):
        command.interpreters(command.parse([]))

"""Rows that are read from runs, against HELM's own statistics and against sums made here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.metrics.metric import MetricSpec
from helm.common.codec import from_json

from flexgen_helm.reports.answers import REQUEST_COLUMNS, ROW_COLUMNS, Answers, Metrics, read_answers
from flexgen_helm.reports.main_metrics import MainMetrics
from flexgen_helm.reports.selection import select_one
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeLoader, _logprob, run_spec
from tests.reports.synthetic import Answer, Suite
from tests.reports.test_runs import perturbed

WORDS = MainMetrics({"words": {"main_name": "exact_match", "main_split": "test"}}, {})
TEXT = MainMetrics({"text": {"main_name": "bits_per_byte", "main_split": "test"}}, {})


def read(suite: Path, main: MainMetrics = WORDS) -> Answers:
    return read_answers(select_one(str(suite), suite), Metrics(main, {}), name="x")


def values(answers: Answers, **wanted: Any) -> list[dict[str, Any]]:
    rows = answers.rows
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    return list(rows.to_dict("records"))


@pytest.mark.parametrize("method", ["generation", "multiple_choice_joint", "multiple_choice_separate_calibrated"])
def test_scores_are_those_of_which_helm_makes_its_mean(run_suite: RunSuite, loader: FakeLoader, method: str) -> None:
    suite = run_suite([perturbed(run_spec(method, words="apple pear fig", max_eval_instances=3))])
    answers = read(suite)
    (scenario,) = answers.runs
    plain = answers.rows[(answers.rows.perturbation == "") & answers.rows.counts]
    assert plain.score.mean() == pytest.approx(answers.runs[scenario].score)
    assert len(plain) == 3
    assert len(answers.rows) == 6
    assert list(answers.rows.columns) == list(ROW_COLUMNS)
    assert list(answers.requests.columns) == list(REQUEST_COLUMNS)
    assert set(answers.rows.cluster) == {f"{scenario} 0"}


def test_the_log_probability_of_the_right_choice_is_the_sum_over_its_letters(run_suite: RunSuite, loader: FakeLoader) -> None:
    suite = run_suite([run_spec("multiple_choice_separate_calibrated", words="apple pear fig")])
    answers = read(suite)
    state = from_json(next(suite.glob("*/scenario_state.json")).read_text(), ScenarioState)
    right = {
        one.instance.id: reference.output.text
        for one in state.request_states
        for reference in one.instance.references
        if reference.is_correct
    }
    assert right
    for row in values(answers):
        assert row["logprob"] == pytest.approx(sum(map(_logprob, right[row["instance"]])))
        assert row["correct"] == right[row["instance"]]
        assert math.isnan(row["tokens"])
        assert math.isnan(row["parsable"])
    assert set(answers.requests["mode"]) == {"original", "calibration"}


def test_generated_answers_have_text_length_and_the_sum_of_their_log_probabilities(
    run_suite: RunSuite, loader: FakeLoader
) -> None:
    suite = run_suite([run_spec("generation", num_outputs=1)])
    answers = read(suite)
    states = from_json(next(suite.glob("*/scenario_state.json")).read_text(), ScenarioState).request_states
    for row, state in zip(values(answers), states, strict=True):
        assert state.result is not None
        (completion,) = state.result.completions
        assert row["answer"] == completion.text
        assert row["tokens"] == len(completion.tokens)
        assert row["answer_logprob"] == pytest.approx(sum(token.logprob for token in completion.tokens))
        assert row["parsable"] == float(bool(completion.text.strip()))
        assert math.isnan(row["logprob"])


def test_only_letters_that_were_offered_are_parsable(tmp_path: Path) -> None:
    texts = {"A": 1.0, " B\n": 1.0, "E": 0.0, "": 0.0, "A.": 0.0}
    Suite(tmp_path).run("mmlu:subject=x", [Answer(text=text) for text in texts], groups=["words"])
    assert [row["parsable"] for row in values(read(tmp_path))] == list(texts.values())


def test_bits_of_windows_have_helms_quotient_as_their_mean(tmp_path: Path) -> None:
    windows = [Answer(instance="id0", logprobs=(-1.0, -2.0)), Answer(instance="id0", logprobs=(-3.0,) * 5)]
    Suite(tmp_path).run("perplexity:path=x", windows, method="language_modeling", groups=["text"])
    answers = read(tmp_path, TEXT)
    assert list(answers.rows.part) == [0, 1]
    assert list(answers.rows.logprob) == [-3.0, -15.0]
    # 18 nats over 7 bytes, as compute_perplexity_metrics divides them
    assert answers.rows.score.mean() == pytest.approx(18 / 7 / math.log(2))
    ((first,), (second,)) = answers.texts("perplexity:path=x").values()
    assert first["prompt"] == second["prompt"] == "Question: id0\nAnswer:"


def test_zeros_for_log_probabilities_are_none(tmp_path: Path) -> None:
    suite = Suite(tmp_path, "openai/model", record=None)
    suite.run("hs:x=1", [Answer(logprobs=(0.0,) * 4)], method="multiple_choice_separate_original", groups=["words"])
    answers = read(tmp_path)
    assert answers.rows.logprob.isna().all()
    assert "the client reported no log-probabilities" in answers.runs["hs:x=1"].reasons["logprob"]
    assert answers.engine is None


def test_a_choice_that_cannot_be_found_among_the_tokens_has_no_log_probability(tmp_path: Path) -> None:
    folder = Suite(tmp_path).run("hs:x=1", [Answer(logprobs=(-1.0,) * 4)], method="multiple_choice_separate_original")
    file = folder / "scenario_state.json"
    file.write_text(file.read_text().replace('"text": " one"', '"text": " \ufffd"'))
    assert math.isnan(read(tmp_path).rows.logprob[0])


def test_infinite_numbers_are_missing(tmp_path: Path) -> None:
    Suite(tmp_path).run("hs:x=1", [Answer(logprobs=(-math.inf, -1, -1, -1))], method="multiple_choice_separate_original")
    (row,) = values(read(tmp_path))
    assert math.isnan(row["logprob"])


def test_digests_name_everything_that_was_asked_but_the_model(tmp_path: Path) -> None:
    for number, (name, prompt) in enumerate({"flexgen/o/a": "x", "flexgen/o/b": "x", "flexgen/o/c": "y"}.items()):
        Suite(tmp_path / str(number), name).run("mmlu:subject=x", [Answer(prompt=prompt)])
    first, second, third = (read(tmp_path / str(number)).rows.prompt[0] for number in range(3))
    assert first == second != third


def test_why_a_column_is_empty_is_said_only_where_it_is(tmp_path: Path) -> None:
    Suite(tmp_path).run("mmlu:subject=x", [Answer()], groups=["words"])
    assert set(read(tmp_path).runs["mmlu:subject=x"].reasons) == {"logprob"}
    unknown = read(tmp_path, MainMetrics({"words": {"main_name": "f1", "main_split": "test"}}, {}))
    assert unknown.runs["mmlu:subject=x"].reasons["score"] == "HELM computes f1 for the whole run only"


def test_metrics_that_helm_derives_from_several_entries_are_joined(run_suite: RunSuite, loader: FakeLoader) -> None:
    """Each metric class writes an entry of its own for an instance."""
    spec = run_spec("generation")
    more = replace(spec, metric_specs=[*spec.metric_specs, MetricSpec("tests.reports.test_answers.Second")])
    suite = run_suite([more])
    entries = json.loads(next(suite.glob("*/per_instance_stats.json")).read_text())
    assert len(entries) == 2 * len(read(suite).rows)


def _second() -> Any:
    from helm.benchmark.metrics.metric import Metric
    from helm.benchmark.metrics.metric_name import MetricName
    from helm.benchmark.metrics.statistic import Stat

    class Second(Metric):
        def evaluate_generation(self, *arguments: Any, **more: Any) -> list[Any]:
            return [Stat(MetricName("second")).add(1)]

    return Second


Second = _second()

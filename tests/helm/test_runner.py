"""The runner against HELM's own, and what only it does."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from helm.benchmark.executor import ExecutorError
from helm.benchmark.metrics.basic_metrics import BasicGenerationMetric
from helm.benchmark.metrics.metric import MetricSpec
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner, RunnerError

from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.helm.run_record import WORKLOAD_FILE
from flexgen_helm.helm.runner import FlexGenRunner
from tests.helm.conftest import RunSuite
from tests.helm.fakes import REFUSED, FakeLoader, run_spec
from tests.helm.files import FILES, completed, read, timeless

METHODS = ("generation", "multiple_choice_joint", "multiple_choice_separate_original")


def test_files_equal_those_of_helms_runner_through_the_client(run_suite: RunSuite, loader: FakeLoader) -> None:
    specs = [
        *(run_spec(method) for method in METHODS),
        run_spec("multiple_choice_separate_calibrated"),
        run_spec(name="five", num_outputs=3, temperature=1.0, random="2"),
    ]
    theirs = run_suite(specs, Runner, suite="theirs", cache="one")
    ours = run_suite(specs, suite="ours", cache="two")
    for spec in specs:
        for file in FILES:
            assert timeless(read(ours, spec.name, file)) == timeless(read(theirs, spec.name, file)), (spec.name, file)
    assert len(read(ours, "five", "scenario_state.json")["request_states"][0]["result"]["completions"]) == 3


def test_requests_of_all_entries_are_one_workload(run_suite: RunSuite, loader: FakeLoader) -> None:
    suite = run_suite([run_spec(method) for method in METHODS])
    (jobs,) = loader.engine.runs
    # Three questions; three answers to score for each of them with the last method.
    assert len(jobs) == 3 + 3 + 9
    assert loader.few_requests is False
    assert loader.engine.submitted == []
    for method, requests in zip(METHODS, (3, 3, 9), strict=True):
        results = [state["result"] for state in read(suite, method, "scenario_state.json")["request_states"]]
        assert len(results) == requests
        assert {result["batch_size"] for result in results} == {15}
        assert len({result["batch_request_time"] for result in results}) == 1


def test_deployments_take_turns(run_suite: RunSuite, loader: FakeLoader) -> None:
    names = ["flexgen/test/letters", "flexgen/test/others", "flexgen/test/letters"]
    run_suite([run_spec(name=f"run{number}", deployment=name) for number, name in enumerate(names)])
    first, second = loader.engines
    assert (first.arguments["name_or_path"], second.arguments["name_or_path"]) == ("letters", "others")
    assert (len(first.runs[0]), len(second.runs[0])) == (6, 3)
    assert first.closed


def test_scenario_that_fails_does_not_take_the_suite_with_it(run_suite: RunSuite, loader: FakeLoader, tmp_path: Path) -> None:
    specs = [run_spec(name="broken", broken=True), run_spec(), run_spec(name="refused", words=f"fig {REFUSED}")]
    with pytest.raises(
        RunnerError, match=r'Failed runs: \["broken", "refused"\]. broken: ValueError: this scenario has no data; refused: '
    ):
        run_suite(specs)
    assert completed(tmp_path / "output" / "runs" / "suite") == ["generation"]


def test_a_failed_request_is_named_with_its_reason(
    run_suite: RunSuite, loader: FakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="helm"), pytest.raises(RunnerError):
        run_suite([run_spec(words=f"fig {REFUSED}")])
    assert "InvalidJob: the fake engine refuses this prompt (1 of 2 requests failed.)" in caplog.text


def test_deployment_that_cannot_be_loaded_fails_only_its_runs(run_suite: RunSuite, loader: FakeLoader, tmp_path: Path) -> None:
    begin = time.monotonic()
    loader.error = UnsupportedModel("falcon cannot be packed")
    with pytest.raises(RunnerError, match=r'\["generation", "two"\]'):
        run_suite([run_spec(), run_spec(name="two"), run_spec(name="simple", deployment="simple/model1")])
    assert completed(tmp_path / "output" / "runs" / "suite") == ["simple"]
    assert time.monotonic() - begin < 60


def test_exit_on_error_raises_the_first_error(run_suite: RunSuite, loader: FakeLoader, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data"):
        run_suite([run_spec(), run_spec(name="broken", broken=True)], exit_on_error=True)
    assert loader.engines == []
    with pytest.raises(ExecutorError, match="refuses this prompt"):
        run_suite([run_spec(words=f"fig {REFUSED}"), run_spec(name="two")], exit_on_error=True)
    assert completed(tmp_path / "output" / "runs" / "suite") == []


def test_two_runs_of_one_name_are_refused_and_the_same_run_twice_is_one(run_suite: RunSuite, loader: FakeLoader) -> None:
    with pytest.raises(FlexGenError, match=r'name "words" .*test/letters and flexgen/test/others.*model_deployment='):
        run_suite([run_spec(name="words"), run_spec(name="words", deployment="flexgen/test/others")])
    assert loader.engines == []
    run_suite([run_spec(), run_spec()])
    assert [len(jobs) for jobs in loader.engine.runs] == [3]


def test_other_vendors_run_through_helm(run_suite: RunSuite, loader: FakeLoader) -> None:
    specs = [run_spec(name="simple", deployment="simple/model1"), run_spec()]
    theirs = run_suite(specs[:1], Runner, suite="theirs", cache="one")
    ours = run_suite(specs, suite="ours", cache="two")
    assert len(loader.engine.runs[0]) == 3
    for file in FILES:
        assert timeless(read(ours, "simple", file)) == timeless(read(theirs, "simple", file))


def test_cached_answers_are_not_computed_again(run_suite: RunSuite, loader: FakeLoader, tmp_path: Path) -> None:
    first = run_suite([run_spec()], suite="first")
    second = run_suite([run_spec(), run_spec(name="more", words="apple pear plum fig grape", max_eval_instances=5)])
    assert [len(jobs) for jobs in loader.engine.runs] == [3, 2]
    assert timeless(read(first, "generation", "stats.json")) == timeless(read(second, "generation", "stats.json"))
    states = read(second, "more", "scenario_state.json")["request_states"]
    assert sorted(state["result"]["cached"] for state in states) == [False, False, True, True, True]
    (report,) = json.loads((second / WORKLOAD_FILE).read_text())
    assert (report["num_requests"], report["num_cached"], report["measured"]["stats"]["num_jobs"]) == (8, 6, 2)


def test_answers_of_other_numerics_are_not_served(run_suite: RunSuite, loader: FakeLoader) -> None:
    run_suite([run_spec()])
    loader.engine.numerics = replace(loader.engine.numerics, engine=2)
    run_suite([run_spec()])
    assert [len(jobs) for jobs in loader.engine.runs] == [3, 3]


def test_runner_and_client_share_their_cache(run_suite: RunSuite, loader: FakeLoader) -> None:
    run_suite([run_spec(method) for method in METHODS])
    run_suite([run_spec(method) for method in METHODS], Runner, suite="client")
    assert loader.engine.submitted == []


def test_what_was_computed_survives_an_interruption(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_suite([run_spec(words="kumquat")])
    engine = loader.engine
    whole = engine.run

    def interrupted(jobs: Any, on_result: Any = None, **_: Any) -> Any:
        on_result(0, engine.answer(jobs[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_suite([run_spec()])
    message = "flexgen-helm: interrupted. Finished answers are kept; run the same command again to continue.\n"
    assert capsys.readouterr().err.endswith(message)
    monkeypatch.setattr(engine, "run", whole)
    run_suite([run_spec()])
    assert [len(jobs) for engine in loader.engines for jobs in engine.runs] == [1, 2]


def test_without_a_cache_everything_is_computed_again(run_suite: RunSuite, loader: FakeLoader) -> None:
    for _ in range(2):
        run_suite([run_spec()], execution={"sqlite_cache_backend_config": None})
    assert [len(jobs) for jobs in loader.engine.runs] == [3, 3]


def test_summary_line_reports_the_work(run_suite: RunSuite, loader: FakeLoader, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="helm"):
        run_suite([run_spec("multiple_choice_separate_original", words="abcd")])
    asked = len("abcd yes") + len("abcd no") + len("abcd maybe")
    expected = (
        "flexgen/test/letters: 3 requests, 0 of them cached; 3 requests in 2.0 s: "
        f"{asked} prompt tokens asked, {asked // 2} computed, 0 generated, 0 sweeps, {asked // 2 / 2:.0f} tokens/s"
    )
    assert expected in caplog.text


@pytest.mark.parametrize("flag", ["skip_instances", "cache_instances_only"])
def test_no_engine_is_loaded_where_nothing_is_to_be_computed(flag: str, run_suite: RunSuite, loader: FakeLoader) -> None:
    suite = run_suite([run_spec()], cache_instances=True, **{flag: True})
    assert (loader.attempts, completed(suite)) == (0, [])


def test_dry_run_writes_requests_without_results(run_suite: RunSuite, loader: FakeLoader) -> None:
    suite = run_suite([run_spec()], execution={"dry_run": True})
    states = read(suite, "generation", "scenario_state.json")["request_states"]
    assert (len(states), any("result" in state for state in states)) == (3, False)
    assert loader.attempts == 0


def test_cached_instances_are_read_instead_of_the_scenario(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_suite([run_spec()], suite="first", cache_instances=True)
    monkeypatch.setattr("tests.helm.fakes.WordsScenario.get_instances", None)
    second = run_suite([run_spec()], suite="second", cache_instances=True)
    for file in FILES:
        assert timeless(read(first, "generation", file)) == timeless(read(second, "generation", file))


def test_completed_runs_are_skipped(run_suite: RunSuite, loader: FakeLoader) -> None:
    suite = run_suite([run_spec()])
    before = (suite / "generation" / "stats.json").stat().st_mtime_ns
    run_suite([run_spec(), run_spec("multiple_choice_joint")], skip_completed_runs=True)
    assert [len(jobs) for jobs in loader.engine.runs] == [3, 3]
    assert (suite / "generation" / "stats.json").stat().st_mtime_ns == before


class RandomMetric(BasicGenerationMetric):
    """Draws from the global generators that HELM seeds while it adapts."""

    drawn: ClassVar[list[tuple[float, float]]] = []

    def __init__(self) -> None:
        super().__init__(names=[])
        self.drawn.append((random.random(), float(np.random.rand())))


def test_each_run_finds_the_random_state_as_it_left_it(run_suite: RunSuite, loader: FakeLoader) -> None:
    def spec(trials: int) -> RunSpec:
        made = run_spec(name=f"trials{trials}", num_train_trials=trials, max_eval_instances=2)
        made.metric_specs.append(MetricSpec("tests.helm.test_runner.RandomMetric"))
        return made

    RandomMetric.drawn.clear()
    run_suite([spec(1)], suite="alone1", cache="one")
    run_suite([spec(3)], suite="alone3", cache="one")
    run_suite([spec(1), spec(3)], FlexGenRunner, cache="two")
    alone, together = RandomMetric.drawn[:2], RandomMetric.drawn[2:]
    assert together == alone
    assert alone[0] != alone[1]


class SignalMetric(BasicGenerationMetric):
    """Sets a signal handler, which only the main thread may; some of HELM's metrics do so when they are imported."""

    def __init__(self) -> None:
        super().__init__(names=[])
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))


def test_runs_stay_in_the_main_thread(run_suite: RunSuite, loader: FakeLoader) -> None:
    spec = run_spec()
    spec.metric_specs.append(MetricSpec("tests.helm.test_runner.SignalMetric"))
    assert completed(run_suite([spec])) == ["generation"]

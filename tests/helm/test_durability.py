"""What a killed or failed suite leaves behind, and what the same command makes of it."""

from __future__ import annotations

import itertools
import json
import resource
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.runner import RunnerError
from helm.common.cache import SqliteCacheConfig
from helm.common.general import write

from flexgen_helm.errors import DiskFull, FlexGenError
from flexgen_helm.helm import pausing, registry
from flexgen_helm.helm.journal import FOLDER
from flexgen_helm.helm.run_record import RUN_FILE, WORKLOAD_FILE
from flexgen_helm.types import EngineInfo, MachineNumerics, Policy, ResolvedPolicy, Result, RowNumerics
from tests.helm.conftest import RunSuite
from tests.helm.fakes import POLICY, FakeEngine, FakeLoader, numerics_of, run_spec
from tests.helm.files import FILES, completed, read, timeless

NO_CACHE = {"sqlite_cache_backend_config": None}
SPECS = [run_spec(), run_spec("multiple_choice_joint"), run_spec("multiple_choice_separate_original")]


class Killed(BaseException):
    """Ends the process at once, as far as a test can."""


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, answers: int) -> Iterator[None]:
    """The process dies when that many jobs of a workload are answered."""
    whole = FakeEngine.run

    def run(self: FakeEngine, jobs: Any, on_result: Callable[[int, Result], None], **options: Any) -> Any:
        for position, job in enumerate(jobs[:answers]):
            on_result(position, self.answer(job))
        raise Killed

    monkeypatch.setattr(FakeEngine, "run", run)
    with pytest.raises(Killed):
        yield
    monkeypatch.setattr(FakeEngine, "run", whole)


def computed(loader: FakeLoader) -> list[int]:
    """Jobs of each workload that was computed to its end."""
    return [len(jobs) for engine in loader.engines for jobs in engine.runs]


@pytest.mark.parametrize("execution", [{}, NO_CACHE])
def test_the_same_command_computes_only_what_is_missing(
    execution: dict[str, Any], run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run_suite(SPECS, suite="undisturbed", cache="other", execution=execution)
    # HELM's cache gets what the journal has only when the workload ends; a kill leaves no time for that.
    with monkeypatch.context() as patch:
        patch.setattr("flexgen_helm.helm.response_cache.ResponseCache.write", lambda *_: None)
        for _ in range(2):
            with killed_after(patch, 4):
                run_suite(SPECS, execution=execution)
    suite = run_suite(SPECS, execution=execution)
    assert computed(loader) == [15, 15 - 2 * 4]
    for spec in SPECS:
        for file in FILES:
            assert timeless(read(suite, spec.name, file)) == timeless(read(undisturbed, spec.name, file))
    assert not (suite / FOLDER).exists()
    (report,) = json.loads((suite / WORKLOAD_FILE).read_text())
    assert (report["num_requests"], report["num_cached"], report["num_resumed"]) == (15, 0, 8)
    assert report["measured"]["stats"]["num_jobs"] == 7
    sources = [read(suite, spec.name, RUN_FILE)["requests"] for spec in SPECS]
    assert sources == [{"total": 3, "resumed": 3}, {"total": 3, "resumed": 3}, {"total": 9, "resumed": 2, "computed": 7}]
    resumed = [state["result"]["cached"] for state in read(suite, SPECS[0].name, "scenario_state.json")["request_states"]]
    assert resumed == [True, True, True]


def test_a_clock_that_is_set_back_changes_no_duration(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(2_000_000_000, -1000)
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    suite = run_suite(SPECS[:1])
    results = [state["result"] for state in read(suite, "generation", "scenario_state.json")["request_states"]]
    assert results
    for result in results:
        assert 0 <= result["request_time"] <= result["batch_request_time"] < 1000
        assert result["request_datetime"] > 1_900_000_000


def test_other_runs_of_the_suite_find_the_answers_too(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(monkeypatch, 3):
        run_suite(SPECS, execution=NO_CACHE)
    suite = run_suite(SPECS[:1], execution=NO_CACHE)
    assert computed(loader) == []
    # The other two are still unfinished.
    assert len(list((suite / FOLDER).glob("*.jsonl"))) == 1
    run_suite(SPECS, execution=NO_CACHE, skip_completed_runs=True)
    assert computed(loader) == [12]
    assert not (suite / FOLDER).exists()


def test_a_kill_while_runs_are_finished_repeats_nothing(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pausing.PausableRun, "_publish", die)
        with pytest.raises(Killed):
            run_suite(SPECS, execution=NO_CACHE)
    run_suite(SPECS, execution=NO_CACHE)
    assert computed(loader) == [15]


def test_files_of_a_run_appear_only_when_all_are_there(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write

    def torn(path: str, content: str) -> None:
        if path.endswith("per_instance_stats.json"):
            whole(path, content[: len(content) // 2])
            raise Killed
        whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("helm.benchmark.runner.write", torn)
        # Not even what is cleaned up after an error.
        patch.setattr("flexgen_helm.helm.pausing.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            run_suite(SPECS[:1])
    suite = run_suite(SPECS[:1], skip_completed_runs=True)
    assert completed(suite) == ["generation"]
    assert read(suite, "generation", "per_instance_stats.json")


def test_a_resumed_run_keeps_its_row_sizes(run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, other = (
        ResolvedPolicy(gpu_batch_size=48, gpu_batch_tokens=96),
        ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=32),
    )
    with monkeypatch.context() as patch:
        for policy, specs in ((begun, SPECS), (other, SPECS[:2])):
            rows = RowNumerics("packed", policy.gpu_batch_size, policy.gpu_batch_tokens)
            info = EngineInfo(policy, replace(numerics_of("letters"), rows=rows), 32.0, 32.0, {})
            patch.setattr(FakeEngine, "describe", lambda self, info=info: info)
            with killed_after(patch, 2):
                run_suite(specs, execution=NO_CACHE)
        registry.ENGINES.close()
        loader.engines.clear()
    run_suite(SPECS, execution=NO_CACHE)
    assert [engine.arguments.get("policy") for engine in loader.engines] == [
        Policy(gpu_batch_size=48, gpu_batch_tokens=96, auto=True)
    ]


@pytest.mark.parametrize("attention", ["host", "device"])
def test_a_resumed_run_keeps_the_place_of_attention(
    attention: str, run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, numerics = ResolvedPolicy(gpu_batch_size=48, gpu_batch_tokens=96), numerics_of("letters")
    begun = replace(numerics, machine=MachineNumerics("cuda", attention), rows=RowNumerics("packed", 48, 96))
    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "describe", lambda self: EngineInfo(policy, begun, 32.0, 32.0, {}))
        with killed_after(patch, 2):
            run_suite(SPECS, execution=NO_CACHE)
    registry.ENGINES.close()
    loader.engines.clear()
    run_suite(SPECS, execution=NO_CACHE)
    expected = Policy(gpu_batch_size=48, gpu_batch_tokens=96, cpu_attention=float(attention == "host"), auto=True)
    assert [engine.arguments.get("policy") for engine in loader.engines] == [expected]


def test_answers_are_kept_while_a_run_has_failed(run_suite: RunSuite, loader: FakeLoader) -> None:
    broken = run_spec(name="broken", broken=True)
    for _ in range(2):
        with pytest.raises(RunnerError, match="broken"):
            run_suite([*SPECS, broken], execution=NO_CACHE)
    assert computed(loader) == [15]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond a size, which is a full disk to this process."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("execution", [{}, NO_CACHE])
def test_full_disk_ends_in_one_error_and_keeps_what_was_finished(
    execution: dict[str, Any], run_suite: RunSuite, loader: FakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    with file_size_limit(3000), pytest.raises(DiskFull) as raised, caplog.at_level("INFO", logger="helm"):
        run_suite(SPECS, execution=execution)
    assert "Free some space. Finished answers are kept; run the same command again to continue." in str(raised.value)
    assert "Error when running" not in caplog.text
    suite = run_suite(SPECS, execution=execution)
    report = json.loads((suite / WORKLOAD_FILE).read_text())[0]
    assert completed(suite) == sorted(spec.name for spec in SPECS)
    if execution:
        assert report["num_resumed"] > 0


def test_full_disk_while_helm_writes_its_files(run_suite: RunSuite, loader: FakeLoader) -> None:
    # Journal records are shorter than HELM's scenario states.
    with file_size_limit(9000), pytest.raises(DiskFull, match=r"Running multiple_choice_separate_original: .*Free some space"):
        run_suite(SPECS[2:], execution=NO_CACHE)
    suite = run_suite(SPECS[2:], execution=NO_CACHE)
    assert computed(loader) == [9]
    assert completed(suite) == ["multiple_choice_separate_original"]


def test_errors_on_purpose_end_the_command_in_one_line_and_others_with_a_traceback(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with file_size_limit(3000), pytest.raises(DiskFull) as full:
        run_suite(SPECS, execution=NO_CACHE)
    with pytest.raises(RunnerError) as failed:
        run_suite([run_spec(name="broken", broken=True)])
    for raised in (full, failed):
        capsys.readouterr()
        sys.excepthook(raised.type, raised.value, raised.tb)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"flexgen-helm: {raised.type.__name__}: ")
        assert str(raised.value) in line
    sys.excepthook(KeyError, KeyError("ours"), failed.tb)
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_report_of_a_run(run_suite: RunSuite, loader: FakeLoader) -> None:
    report = read(run_suite(SPECS[:2]), "generation", RUN_FILE)
    assert report["deployment"] == "flexgen/test/letters"
    assert report["model"] == "letters"
    assert report["variant"] is None
    assert report["policy"] == json.loads(json.dumps(vars(POLICY)))
    assert report["numerics"]["weights"]["digest"] == "letters"
    assert (report["bits_per_weight"], report["bits_per_cache_element"]) == (32.0, 32.0)
    assert set(report["weight_bytes"]) == {"device", "host", "disk"}
    assert report["requests"] == {"total": 3, "computed": 3}
    workload = report["workload"]
    assert (workload["requests"], workload["cached"], workload["resumed"]) == (6, 0, 0)
    measured = report["measured"]
    stats = measured["stats"]
    assert (measured["date"], measured["roofline_efficiency"]) == (workload["date"], 0.5)
    assert measured["bound_by"] == "reading weights from the disk"
    assert "more host memory" in measured["what_would_help"]
    assert measured["tokens_per_second"] == (stats["prompt_tokens_computed"] + stats["generated_tokens"]) / stats["seconds"]
    assert (stats["bytes_moved"], stats["busy_seconds"]) == ({"disk_read": 8}, {"disk_read": 0.5})
    assert (stats["tier_peak_bytes"], stats["limit_seconds"]) == ({"host": 4, "disk": 8}, 1.0)
    assert stats["per_sweep"] == {
        "bound_by": {"disk_read": 1},
        "limit": {
            "median": 0.5,
            "worst": 0.5,
            "worst_sweep": 1,
            "quantiles": dict.fromkeys(("10%", "25%", "75%", "90%"), 0.5),
            "every": 1,
            "sweeps": [[2.0, 1.0, "disk_read"]],
        },
    }
    assert stats["device_wait_seconds"] == {"weights": 0.5}


@pytest.mark.parametrize("flag", ["skip_instances", "cache_instances_only"])
def test_options_that_write_nothing_leave_finished_runs_alone(flag: str, run_suite: RunSuite, loader: FakeLoader) -> None:
    suite = run_suite(SPECS[:1])
    before = {file: read(suite, "generation", file) for file in (*FILES, RUN_FILE)}
    run_suite(SPECS[:1], **{flag: True})
    assert {file: read(suite, "generation", file) for file in before} == before


def test_dry_run_replaces_the_report_too(run_suite: RunSuite, loader: FakeLoader) -> None:
    suite = run_suite(SPECS[:1])
    run_suite(SPECS[:1], execution={"dry_run": True})
    assert not (suite / "generation" / RUN_FILE).exists()


def test_a_second_command_on_the_same_runs_leaves_the_first_alone(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, refused = FakeEngine.run, list[str]()

    def run(self: FakeEngine, *arguments: Any, **options: Any) -> Any:
        if not refused:
            with pytest.raises(FlexGenError) as raised:
                run_suite(SPECS)
            refused.append(str(raised.value))
        return whole(self, *arguments, **options)

    monkeypatch.setattr(FakeEngine, "run", run)
    assert completed(run_suite(SPECS)) == sorted(spec.name for spec in SPECS)
    assert "Another helm-run is working on the same run entries" in refused[0]


def test_a_second_command_on_some_of_the_runs_leaves_the_first_alone(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, nested = FakeEngine.run, list[bool]()

    def run(self: FakeEngine, *arguments: Any, **options: Any) -> Any:
        if not nested:
            nested.append(True)
            run_suite(SPECS[:1])
        return whole(self, *arguments, **options)

    monkeypatch.setattr(FakeEngine, "run", run)
    suite = run_suite(SPECS)
    assert completed(suite) == sorted(spec.name for spec in SPECS)
    assert not (suite / FOLDER).exists()


def test_a_figure_that_cannot_be_measured_loses_no_answers(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> float:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(FakeEngine, "with_limit", out_of_memory)
    suite = run_suite(SPECS[:1])
    measured = read(suite, "generation", RUN_FILE)["measured"]
    assert measured["roofline_efficiency"] is measured["stats"]["per_sweep"]["limit"] is None
    assert measured["stats"]["limit_unknown"] == "the machine's rates could not be measured: CUDA out of memory"


def test_a_cache_that_cannot_be_written_loses_no_answers(
    run_suite: RunSuite, loader: FakeLoader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_suite(SPECS[:1], suite="other")
    cache = registry.ENGINES.caches.get(SqliteCacheConfig(str(tmp_path / "cache" / "flexgen.sqlite")))
    cache._store._connection.execute("PRAGMA query_only = 1")  # type: ignore[attr-defined]
    with caplog.at_level("WARNING", logger="helm"):
        assert completed(run_suite(SPECS)) == sorted(spec.name for spec in SPECS)
    assert "Answers are not in HELM's cache, but in the journal until all runs are complete." in caplog.text


def test_a_damaged_answer_in_the_cache_is_computed_again(run_suite: RunSuite, loader: FakeLoader, tmp_path: Path) -> None:
    run_suite(SPECS[:1])
    with sqlite3.connect(tmp_path / "cache" / "flexgen.sqlite") as connection:
        connection.execute('UPDATE "unnamed" SET value = substr(value, 1, 20)')
    run_suite(SPECS[:1])
    run_suite(SPECS[:1])
    assert computed(loader) == [3, 3]

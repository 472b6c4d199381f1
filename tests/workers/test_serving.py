"""A command whose requests are answered elsewhere: by workers in this process, which fail as others do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
from helm.benchmark.model_deployment_registry import ModelDeployment
from helm.benchmark.runner import RunnerError

from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.registry import EngineRegistry
from flexgen_helm.helm.run_record import RUN_FILE, WORKLOAD_FILE
from flexgen_helm.run_stats import RunStats
from flexgen_helm.types import Job, Result
from flexgen_helm.workers.meeting import Meeting, meeting
from flexgen_helm.workers.options import Workers
from flexgen_helm.workers.runner import RayRunner
from flexgen_helm.workers.share import Outcome, Refusal, Share
from flexgen_helm.workers.totals import together
from flexgen_helm.workers.worker import answer
from tests.helm.conftest import RunSuite
from tests.helm.fakes import REFUSED, FakeEngine, FakeLoader, numerics_of, run_spec
from tests.helm.files import FILES, completed, read, timeless

METHODS = ("generation", "multiple_choice_joint", "multiple_choice_separate_original")


class Lost(BaseException):
    """The end of a worker's process."""


@dataclass
class Pool:
    """Workers one after another; one that is lost is tried again."""

    shares: list[Share] = field(default_factory=list)
    attempts: int = 0
    change: Callable[[Share], Share] = lambda share: share

    def gpus(self, deployment: ModelDeployment) -> float:
        return 0

    def run(self, shares: Sequence[Share], gpus: float, watch: Callable[[], None]) -> list[Outcome | Refusal]:
        self.shares += shares
        outcomes = []
        for share in shares:
            outcome: Outcome | Refusal | None = None
            while outcome is None:
                self.attempts += 1
                try:
                    outcome = answer(self.change(share), EngineRegistry())
                except FlexGenError as error:
                    outcome = Refusal("host", error)
                except Lost:
                    pass
                watch()
            outcomes.append(outcome)
        return outcomes

    def close(self) -> None: ...


class PoolRunner(RayRunner):
    """The runner with workers in this process."""

    pool: Pool
    made: ClassVar[list[Pool]] = []
    change: ClassVar[Callable[[Share], Share]] = staticmethod(lambda share: share)

    def make_pool(self, workers: Workers) -> Pool:
        self.made.append(Pool(change=type(self).change))
        return self.made[-1]


@pytest.fixture(autouse=True)
def _two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_WORKERS", "2")
    monkeypatch.setattr(Workers, "check", lambda workers: None)
    monkeypatch.setattr(PoolRunner, "made", [])


def assert_same_files(one: Path, two: Path) -> None:
    assert completed(one) == completed(two)
    for run in completed(one):
        for file in FILES:
            assert timeless(read(one, run, file)) == timeless(read(two, run, file)), (run, file)


def test_files_are_those_of_one_worker(run_suite: RunSuite, loader: FakeLoader) -> None:
    specs = [*(run_spec(method) for method in METHODS), run_spec(name="again")]
    one = run_suite(specs, suite="one", cache="one")
    two = run_suite(specs, PoolRunner, suite="two", cache="two")
    assert_same_files(one, two)
    (pool,) = PoolRunner.made
    assert [share.number for share in pool.shares] == [1, 2]
    first, *others = loader.engines
    # No prompt is computed by two workers.
    prompts = [{job.prompt for jobs in engine.runs for job in jobs} for engine in others]
    assert len(prompts) == 2
    assert not prompts[0] & prompts[1]
    assert prompts[0] | prompts[1] == {job.prompt for jobs in first.runs for job in jobs}
    assert all(engine.closed for engine in others)
    report = read(two, "generation", RUN_FILE)
    assert report["requests"] == {"total": 3, "computed": 3}
    (entry,), (alone,) = (json.loads((suite / WORKLOAD_FILE).read_text()) for suite in (two, one))
    assert entry["measured"]["stats"]["num_jobs"] == alone["measured"]["stats"]["num_jobs"] == 18
    assert entry["engine"] == alone["engine"]
    assert not list(two.glob("flexgen_journal*"))


def test_a_lost_worker_is_replaced_and_its_answers_are_kept(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    specs = [run_spec(method) for method in METHODS]
    one = run_suite(specs, suite="one", cache="one")
    run = FakeEngine.answer
    answers: list[Job] = []
    lost: list[Job] = []

    def dies_once(job: Job) -> Result:
        if len(answers) == 4 and not lost:
            lost.append(job)
            raise Lost
        answers.append(job)
        return run(job)

    monkeypatch.setattr(FakeEngine, "answer", staticmethod(dies_once))
    with caplog.at_level("INFO", logger="helm"):
        two = run_suite(specs, PoolRunner, suite="two", cache="two")
    assert_same_files(one, two)
    assert PoolRunner.made[0].attempts == 3
    assert len(answers) == 15  # and none of them twice
    assert len(re.findall(r"Worker \d of 2 was lost: process .* \(attempt 2\)", caplog.text)) == 1


def test_what_is_known_is_not_sent(run_suite: RunSuite, loader: FakeLoader) -> None:
    specs = [run_spec(method) for method in METHODS]
    run_suite(specs[:1], PoolRunner)
    suite = run_suite(specs, PoolRunner)
    first, second = PoolRunner.made
    assert sum(len(share.requests) for share in first.shares) == 3
    # Nothing is remembered of a fake model, so workers look up themselves.
    assert sum(len(engine.runs[0]) for engine in loader.engines if engine.runs) == 15
    assert read(suite, "generation", RUN_FILE)["requests"] == {"total": 3, "cached": 3}
    assert len(second.shares) == 2


def test_errors_of_entries_and_requests_are_those_of_one_worker(
    run_suite: RunSuite, loader: FakeLoader, tmp_path: Path
) -> None:
    specs = [run_spec(name="broken", broken=True), run_spec(), run_spec(name="refused", words=f"fig {REFUSED}")]
    causes = []
    for suite, runner in (("one", None), ("two", PoolRunner)):
        with pytest.raises(RunnerError) as caught:
            run_suite(specs, **({"runner": runner} if runner else {}), suite=suite, cache=suite)
        causes.append(str(caught.value))
    assert causes[0] == causes[1]
    assert completed(tmp_path / "output" / "runs" / "two") == ["generation"]
    # Its answers are kept for the next command.
    assert list((tmp_path / "output" / "runs" / "two" / "flexgen_journal").glob("*-*.jsonl"))


def test_a_refused_model_is_tried_once_by_each_worker(run_suite: RunSuite, loader: FakeLoader) -> None:
    loader.error = UnsupportedModel("this model is refused")
    with pytest.raises(RunnerError, match="UnsupportedModel: this model is refused"):
        run_suite([run_spec()], PoolRunner)
    assert PoolRunner.made[0].attempts == 2


def test_a_folder_that_is_not_shared(run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(share: Share) -> Share:
        return replace(share, place=replace(share.place, meeting=Meeting(Path("/mnt/elsewhere"))))

    monkeypatch.setattr(PoolRunner, "change", staticmethod(elsewhere))
    with pytest.raises(RunnerError, match=r"does not see /mnt/elsewhere.*Put --out on a file system that all hosts mount"):
        run_suite([run_spec()], PoolRunner)
    assert not loader.engines


def test_answers_that_are_nowhere(
    run_suite: RunSuite, loader: FakeLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_folder(share: Share) -> Share:
        return replace(share, place=replace(share.place, journals=tmp_path / "elsewhere"))

    monkeypatch.setattr(PoolRunner, "change", staticmethod(other_folder))
    with pytest.raises(RunnerError, match=r"3 answers that workers gave are not in .*flexgen_journal"):
        run_suite([run_spec()], PoolRunner)


def test_engines_that_compute_other_bits_do_not_answer_together(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_version(share: Share) -> Share:
        loader.version = share.number
        return share

    monkeypatch.setattr(PoolRunner, "change", staticmethod(next_version))
    with pytest.raises(RunnerError, match=r"answers with other bits \(engine 1 and 2\).*one FLEXGEN_HELM_CACHE"):
        run_suite([run_spec()], PoolRunner)
    assert [len(engine.runs) for engine in loader.engines] == [1, 0]


def test_a_meeting_is_over_when_the_command_ends(tmp_path: Path) -> None:
    with meeting(tmp_path / "journal") as met:
        met.find()
        met.agree(numerics_of("a"))
        met.agree(numerics_of("a"))
        with pytest.raises(FlexGenError, match=r"\(weights\.digest a and b\)"):
            met.agree(numerics_of("b"))
    with pytest.raises(FlexGenError, match="does not see"):
        met.find()


def test_helpers_of_one_command_have_a_file_each(tmp_path: Path) -> None:
    from tests.helm.test_journal import response

    runs = ["one", "two"]
    with Journal(tmp_path, runs) as command:
        with Journal(tmp_path, runs, helps=True) as first, Journal(tmp_path, runs, helps=True) as second:
            first.note_helper(worker=1)
            first.append("key 1", response(1))
            second.append("key 2", response(2))
            assert [sorted(record) for record in command.refresh()] == [["runs"], ["helper"], ["key"], ["runs"], ["key"]]
            assert command.refresh() == []
        # What goes on for one that is gone has its file and knows the answers of all.
        with Journal(tmp_path, runs, helps=True) as third:
            assert third.lookup("key 1") is not None
            assert third.lookup("key 2") is not None
            third.append("key 3", response(3))
        assert len(command.refresh()) == 1
        assert command.lookup("key 3") is not None
        assert len(list(tmp_path.glob("*.jsonl"))) == 3
        command.discard()
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_record_that_is_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    from tests.helm.test_journal import response

    with Journal(tmp_path, ["one"]) as command:
        with Journal(tmp_path, ["one"], helps=True) as helper:
            command.refresh()
            helper.append("key", response(0))
        (path,) = tmp_path.glob("*-1.jsonl")
        whole = path.read_bytes()
        path.write_bytes(whole[:-40])
        assert command.refresh() == []
        path.write_bytes(whole)
        assert len(command.refresh()) == 1
        assert command.lookup("key") is not None


def test_measurements_of_several_workers() -> None:
    a = RunStats(2, 10, 8, 4, 3, seconds=2.0, peak_bytes=5, bytes_moved={"disk_read": 8}, busy_seconds={"device": 1.0})
    b = RunStats(3, 20, 9, 5, 4, seconds=3.0, peak_bytes=4, bytes_moved={"disk_read": 1}, busy_seconds={"unpack": 0.5})
    limits = [replace(part, limit_seconds=part.seconds / 2, limit_unknown="") for part in (a, b)]
    both = together([*limits, RunStats()])
    assert (both.num_jobs, both.prompt_tokens_asked, both.prompt_tokens_computed) == (5, 30, 17)
    assert (both.generated_tokens, both.sweeps, both.seconds, both.peak_bytes) == (9, 7, 3.0, 5)
    assert both.bytes_moved == {"disk_read": 9}
    assert both.busy_seconds == {"device": 1.0, "unpack": 0.5}
    assert both.roofline_efficiency == 0.5
    assert together([a, limits[1]]).limit_unknown == a.limit_unknown
    assert together([]) == RunStats()

"""A job that fails in code, wherever it does, is the only one that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.errors import JobFailed, OutOfSpace
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.generation.completion import CompletionBuilder
from flexgen_helm.generation.sampling import choose
from flexgen_helm.runtime import worker
from flexgen_helm.schedule.operations import Operation
from flexgen_helm.schedule.rows import Sweep
from tests.jobs import fixed_mix, random_tokens
from tests.workbench import Workbench

JOBS = [job for job in fixed_mix(53, 14) if len(job.token_ids or ()) < 50]
MARK = 1
"""A token of the job that fails."""
CULPRIT = Job(token_ids=(*random_tokens(9, 4), MARK, *random_tokens(10, 4)), max_new_tokens=6)


@pytest.fixture(params=["packed", "single"])
def engine(bench: Workbench, request: pytest.FixtureRequest) -> Engine:
    return bench.engine("llama", rows=request.param)


def mixed(*culprits: Job) -> list[Job]:
    jobs = list(JOBS)
    for number, culprit in enumerate(culprits):
        jobs.insert(3 + 4 * number, culprit)
    return jobs


def failing_sweeps(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Sweep], bool], error: Exception) -> list[Sweep]:
    """Sweeps that fail behind their second operation, as they come."""
    run, failed = SerialExecutor.run, list[Sweep]()

    def faulty(self: SerialExecutor[Any], sweep: Sweep, on_logits: Any, on_operation: Any = None) -> None:
        count = iter(range(10**6))

        def at(operation: Operation) -> None:
            if on_operation is not None:
                on_operation(operation)
            if next(count) == 1 and fails(sweep):
                failed.append(sweep)
                raise error

        run(self, sweep, on_logits, at)

    monkeypatch.setattr(SerialExecutor, "run", faulty)
    return failed


def holds_mark(sweep: Sweep) -> bool:
    return any(MARK in segment.tokens for row in sweep.rows for segment in row.segments)


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), MemoryError("no memory")], ids=["kernel", "memory"])
def test_the_job_for_which_a_sweep_fails_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    expected = engine.run(JOBS)
    failed = failing_sweeps(monkeypatch, holds_mark, error)
    results = engine.run(mixed(CULPRIT), on_error="return")
    bad = results.pop(3)
    assert results == expected
    assert isinstance(bad.error, OutOfSpace if isinstance(error, MemoryError) else JobFailed)
    assert str(error) in str(bad.error)
    assert bad.error.__cause__ is error
    assert 1 < len(failed) <= 2 + len(JOBS).bit_length()
    with pytest.raises(type(bad.error), match=f"^job 3: .*{error}"):
        engine.run(mixed(CULPRIT))
    assert engine.run(JOBS) == expected


def test_several_jobs_that_fail_and_one_that_arrives_meanwhile(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.run(JOBS)
    failing_sweeps(monkeypatch, holds_mark, RuntimeError("a kernel failed"))
    futures = [engine.submit(job) for job in mixed(CULPRIT, replace(CULPRIT, max_new_tokens=0, score_prompt=True))]
    late = engine.submit(JOBS[0])
    errors = [future.exception(timeout=60) for future in futures]
    assert [number for number, error in enumerate(errors) if error is not None] == [3, 7]
    assert [future.result() for future, error in zip(futures, errors, strict=True) if error is None] == expected
    assert late.result(timeout=60) == expected[0]


def test_a_failure_of_every_sweep_is_soon_that_of_all(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.run(JOBS)
    with monkeypatch.context() as patch:
        failed = failing_sweeps(patch, lambda sweep: True, RuntimeError("the device is gone"))
        jobs = [Job(token_ids=(5, 6, number % 300 + 3, number // 300 + 3)) for number in range(400)]
        futures = [engine.submit(job) for job in jobs]
        for future in futures:
            with pytest.raises((JobFailed, RuntimeError), match="the device is gone"):
                future.result(timeout=60)
    assert len(failed) <= 2 * worker.MOST_FAILURES
    assert engine.run(JOBS) == expected


@pytest.mark.parametrize("error", [ValueError("thirteen"), MemoryError("thirteen")], ids=["code", "memory"])
@pytest.mark.parametrize("where", ["choose", "append"])
def test_a_token_that_cannot_be_chosen_or_taken(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    """No sweep is repeated: it is known whose token it is."""
    expected = engine.run(JOBS)
    sampled = replace(CULPRIT, temperature=1.0, top_p=0.77, seed=13)
    append = CompletionBuilder.append

    def choosing(logits: Tensor, *, top_p: float, **options: Any) -> int:
        if top_p == sampled.top_p:
            raise error
        return choose(logits, top_p=top_p, **options)

    def appending(self: CompletionBuilder, *arguments: Any) -> Any:
        if MARK in self._prompt_ids and len(self) == 2:
            raise error
        return append(self, *arguments)

    if where == "choose":
        monkeypatch.setattr("flexgen_helm.generation.replies.choose", choosing)
    else:
        monkeypatch.setattr(CompletionBuilder, "append", appending)
    failed = failing_sweeps(monkeypatch, lambda sweep: False, error)
    results = engine.run(mixed(sampled), on_error="return")
    bad = results.pop(3)
    assert (results, failed) == (expected, [])
    assert isinstance(bad.error, JobFailed if isinstance(error, ValueError) else OutOfSpace)
    assert "thirteen" in str(bad.error)


def test_a_job_that_cannot_be_taken_in(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.run(JOBS)
    build = CompletionBuilder.__init__

    def building(self: CompletionBuilder, vocabulary: Any, prompt_ids: Any, **options: Any) -> None:
        if MARK in prompt_ids:
            raise ValueError("thirteen")
        build(self, vocabulary, prompt_ids, **options)

    monkeypatch.setattr(CompletionBuilder, "__init__", building)
    results = engine.run(mixed(CULPRIT), on_error="return")
    assert isinstance(results.pop(3).error, JobFailed)
    assert results == expected


def test_closing_while_the_job_that_fails_is_looked_for(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=32)
    with Engine.from_pretrained(str(bench.folder("llama")), device="cpu", policy=policy, rows="packed") as engine:
        failing_sweeps(monkeypatch, lambda sweep: True, RuntimeError("a kernel failed"))
        futures = [engine.submit(job) for job in JOBS]
    assert all(future.exception(timeout=60) is not None for future in futures)

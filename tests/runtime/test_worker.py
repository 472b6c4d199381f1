"""Worker: tickets join between sweeps, a failure meets those alone who cause it, and nobody waits for ever."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from flexgen_helm import Job
from flexgen_helm.errors import DiskFull, FlexGenError, JobFailed
from flexgen_helm.generation.prepare import prepare
from flexgen_helm.memory.device import CPU
from flexgen_helm.memory.meter import Meter
from flexgen_helm.runtime.intake import Intake, Ticket
from flexgen_helm.runtime.worker import Snapshot, Worker
from flexgen_helm.schedule.operations import Operation
from flexgen_helm.schedule.rows import LogitRequest, Sweep
from flexgen_helm.schedule.single import SingleScheduler, StateSize
from flexgen_helm.types import ResolvedPolicy, Result

VOCAB = 50
BAD = 13
"""Sweeps with this token fail."""


class Executor:
    """Answers every request with the token that is as large as its row is long."""

    num_layers = 2
    layers = range(num_layers)

    def __init__(self) -> None:
        self.error: Exception = RuntimeError("of the model's code")
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = self.rows_are_whole = False

    def run(
        self,
        sweep: Sweep,
        on_logits: Callable[[list[LogitRequest], Tensor], None],
        on_operation: Callable[[Operation], None],
    ) -> None:
        self.entered.set()
        assert self.gate.wait(timeout=30)
        for k, row in enumerate(sweep.rows):
            if any(BAD in segment.tokens for segment in row.segments):
                raise self.error
            for j in range(self.num_layers):
                on_operation(Operation("compute", j, k))
            requests = list(row.logit_requests())
            on_logits(requests, torch.nn.functional.one_hot(torch.tensor([row.num_tokens] * len(requests)), VOCAB).float())

    def use_whole_rows(self) -> None:
        self.rows_are_whole = True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def executor() -> Executor:
    return Executor()


@pytest.fixture
def worker(executor: Executor) -> Worker:
    policy = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=64)
    scheduler = SingleScheduler(policy, block_tokens=1000, capacity_bytes=1000, size=StateSize(1, 0))
    return Worker([scheduler], executor, Intake(None, frozenset()), Meter(CPU.torch_device), CPU)  # type: ignore[arg-type]


def ticket(*tokens: int, new: int = 1) -> Ticket:
    return Ticket(prepare(Job(token_ids=tokens, max_new_tokens=new), tokenizer=None, max_length=100, vocab_size=VOCAB))


def during_a_sweep(action: Callable[[], None], worker: Worker, executor: Executor) -> None:
    """Does something that waits for the sweep, which goes on only when that has begun."""
    acting = threading.Thread(target=action)
    acting.start()
    while not worker._cancelling:
        time.sleep(0.001)
    executor.gate.set()
    acting.join(timeout=30)


def answer(future: Future[Result]) -> list[int]:
    return future.result(timeout=30).completions[0].token_ids


def test_tickets_are_answered_and_counted(worker: Worker) -> None:
    seen: list[Snapshot] = []
    worker.watch = seen.append
    tickets = [ticket(1, 2, 3, new=3), ticket(4, 5), ticket(4, 5)]
    worker.put(tickets)
    assert [answer(each.future) for each in tickets] == [[3, 1, 1], [2], [2]]
    worker.close()
    assert worker.snapshot.generated_tokens == 4  # equal prompts are computed once
    assert worker.snapshot.prompt_tokens == 5
    assert worker.snapshot.sweeps == 3
    assert [after.sweeps - before.sweeps for before, after in itertools.pairwise(seen)].count(1) == 3
    assert all(0 <= snapshot.sweep_share <= 1 for snapshot in seen)


def test_threads_that_wait_keep_no_threads_of_openmp(
    worker: Worker, executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    monkeypatch.setattr("flexgen_helm.runtime.worker.release_threads", lambda: released.append(threading.current_thread().name))
    executor.gate.clear()
    first = ticket(1, 2)
    worker.put([first])
    assert released.count("MainThread") == 1
    assert executor.entered.wait(timeout=30)
    released.clear()
    executor.gate.set()
    answer(first.future)
    with worker.borrowed():  # the worker rests
        assert "flexgen-helm" in released
        assert "MainThread" not in released
    assert released.count("MainThread") == 1
    worker.close()


def test_a_failure_meets_those_alone_who_cause_it(worker: Worker) -> None:
    tickets = [ticket(1, 2), ticket(BAD), ticket(3), ticket(4, 5, 6), ticket(7, BAD)]
    worker.put(tickets)
    failed = [each.future.exception(timeout=30) for each in tickets]
    assert [isinstance(error, JobFailed) for error in failed] == [False, True, False, False, True]
    assert "of the model's code" in str(failed[1])
    assert answer(tickets[3].future) == [3]
    worker.close()


def test_a_full_disk_is_of_no_job_and_ends_all(worker: Worker, executor: Executor) -> None:
    executor.error = DiskFull("no space left")
    tickets = [ticket(1, 2), ticket(BAD)]
    worker.put(tickets)
    assert [type(each.future.exception(timeout=30)) for each in tickets] == [DiskFull, DiskFull]
    after = ticket(8)
    worker.put([after])
    assert answer(after.future) == [1]
    worker.close()


def test_cancelling_drops_what_is_in_flight_and_leaves_the_worker_usable(worker: Worker, executor: Executor) -> None:
    executor.gate.clear()
    first = ticket(1, 2, new=5)
    worker.put([first])
    assert executor.entered.wait(timeout=30)
    waiting = ticket(3)
    worker.put([waiting])
    during_a_sweep(worker.cancel, worker, executor)
    for each in (first, waiting):
        with pytest.raises(FlexGenError, match="closed or interrupted"):
            each.future.result(timeout=30)
    after = ticket(8)
    worker.put([after])
    assert answer(after.future) == [1]
    assert executor.rows_are_whole
    worker.close()


def test_a_closed_worker_fails_what_is_in_flight_and_takes_nothing_more(worker: Worker, executor: Executor) -> None:
    executor.gate.clear()
    first = ticket(1, 2, new=5)
    worker.put([first])
    assert executor.entered.wait(timeout=30)
    during_a_sweep(worker.close, worker, executor)
    with pytest.raises(FlexGenError, match="closed or interrupted"):
        first.future.result(timeout=30)
    assert executor.closed
    with pytest.raises(FlexGenError, match="This engine is closed"):
        worker.put([ticket(3)])


def test_a_ticket_that_nobody_waits_for_is_not_answered(worker: Worker, executor: Executor) -> None:
    executor.gate.clear()
    dropped, kept = ticket(1, 2), ticket(3, 4, 5)
    worker.put([dropped, kept])
    assert dropped.future.cancel()
    executor.gate.set()
    assert answer(kept.future) == [3]
    assert dropped.future.cancelled()
    worker.close()

"""One run of an engine: submits jobs, returns results when they finish, and measures."""

from __future__ import annotations

import functools
import logging
import queue
import time
from collections.abc import Callable, Iterator
from typing import Literal, TextIO

from flexgen_helm.errors import DiskFull, InvalidJob, JobFailed, OutOfSpace
from flexgen_helm.memory.meter import Meter
from flexgen_helm.run_stats import RunStats
from flexgen_helm.runtime.intake import Ticket
from flexgen_helm.runtime.progress import Progress
from flexgen_helm.runtime.worker import Snapshot, Worker
from flexgen_helm.types import Result

logger = logging.getLogger(__name__)

OnError = Literal["raise", "return"]


class Run:
    """A run: jobs that are answered and measured together."""

    def __init__(
        self, worker: Worker, meter: Meter, tickets: dict[int, Ticket], results: list[Result | None], on_error: OnError
    ) -> None:
        """Prepare the run without submitting jobs.

        Args:
            worker: Worker that computes the jobs.
            meter: Meter that measures the run.
            tickets: Tickets of the valid jobs, by index.
            results: List with an entry for each job; the run fills the entries of the tickets.
            on_error: Whether an error of one job ends the run or becomes its result.
        """
        self._worker, self._meter, self._on_error = worker, meter, on_error
        self._tickets, self._results = tickets, results

    def answer(self, on_result: Callable[[int, Result], None] | None, shown: bool | TextIO | None) -> RunStats:
        """Answer all jobs and return what was measured.

        Args:
            on_result: Function that is called with (index, result) when a job finishes.
            shown: Whether to show progress, or the stream on which to show it.

        Raises:
            FlexGenError: If a job fails and `on_error` is "raise", or if all jobs are given up.
        """
        worker, meter = self._worker, self._meter
        begun = time.perf_counter()  # before the meter, whose sweeps are a part of the run
        meter.begin_run()
        before = worker.snapshot
        progress = Progress(len(self._tickets), since=before, shown=shown)
        worker.watch = progress.update
        try:
            for index in self._finished():
                result = self._results[index] = _result(index, self._tickets[index], self._on_error)
                progress.request_done(result)
                if on_result is not None:
                    on_result(index, result)
            stats = _stats(self._tickets, self._results, before, worker.snapshot)
            stats.seconds = time.perf_counter() - begun
            meter.end_run(stats)
            logger.info("%s", progress.finish(stats))
            return stats
        except BaseException:
            worker.cancel()
            meter.end_run(RunStats())
            raise
        finally:
            worker.watch = None
            progress.close()

    def _finished(self) -> Iterator[int]:
        """Submit all jobs and yield the index of each when it has ended."""
        finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index, ticket in self._tickets.items():
            ticket.future.add_done_callback(functools.partial(_put, finished, index))
        self._worker.put(list(self._tickets.values()))
        for _ in self._tickets:
            yield finished.get()


def _result(index: int, ticket: Ticket, on_error: OnError) -> Result:
    try:
        return ticket.future.result()
    except (InvalidJob, OutOfSpace, JobFailed) as error:  # caused by this job alone
        if on_error == "return":
            return Result(error=error)
        if isinstance(error, DiskFull):
            raise
        raise type(error)(f"job {index}: {error}") from error


def _put(finished: queue.SimpleQueue[int], index: int, _: object) -> None:
    finished.put(index)


def _stats(tickets: dict[int, Ticket], results: list[Result | None], before: Snapshot, after: Snapshot) -> RunStats:
    return RunStats(
        num_jobs=len(results),
        prompt_tokens_asked=sum(len(ticket.prepared.input_ids) for ticket in tickets.values()),
        prompt_tokens_computed=after.prompt_tokens - before.prompt_tokens,
        generated_tokens=after.generated_tokens - before.generated_tokens,
        sweeps=after.sweeps - before.sweeps,
    )

"""Worker: the thread that runs sweeps. It takes tickets in before each sweep and gives results out after it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Protocol

from torch import Tensor

from flexgen_helm.errors import CorruptFile, DiskFull, FlexGenError, OutOfSpace, StageLost
from flexgen_helm.execution.interfaces import Executor
from flexgen_helm.generation.job_errors import of_one_job
from flexgen_helm.machine.openmp import release_threads
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity
from flexgen_helm.runtime.intake import Intake, Ticket, answer
from flexgen_helm.runtime.pipeline.lanes import Lane, distribute
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS
from flexgen_helm.schedule.operations import Operation
from flexgen_helm.schedule.rows import LogitRequest, Sweep
from flexgen_helm.schedule.work import Scheduler

logger = logging.getLogger(__name__)

CLOSED = "This engine is closed. Make a new one with Engine.from_pretrained."
GATHER_SECONDS = 0.01
"""Seconds that an idle worker waits after the first ticket, so that threads that submit together share a sweep."""


@dataclass(frozen=True)
class Snapshot:
    """The worker's progress; counts are since the engine was made."""

    sweeps: int = 0
    prompt_tokens: int = 0
    """Prompt tokens that were computed."""
    generated_tokens: int = 0
    prompt_tokens_left: int = 0
    """Prompt tokens that sweeps after the current one will compute."""
    new_tokens_left: int = 0
    """Most tokens that could still be generated when the current sweep was planned; completions may end earlier."""
    sweep_share: float = 0.0
    """Share of the current sweep's operations that are done."""


class _Cancelled(Exception):
    """The end of a sweep that nobody waits for any more."""


class Pipe(Protocol):
    """The other stages of a pipeline, as the one that plans sees them."""

    def ordered(self, sweep: Sweep) -> AbstractContextManager[None]:
        """Order a sweep from the other stages; this stage's layers are computed in the body of the `with` statement."""

    def answer(self, sweep: Sweep) -> int:
        """Wait for the answers to an ordered sweep and give them to its requests; returns the tokens that were generated.

        Raises:
            FlexGenError: If a stage could not compute it.
        """

    def drop(self, sweeps: Sequence[Sweep]) -> None:
        """Forget ordered sweeps, once the stages are done with them."""


NOT_OF_ONE_JOB = (_Cancelled, DiskFull, CorruptFile, OSError, StageLost)
"""Errors that no single job can cause."""
MOST_FAILURES = 32
"""Sweeps that may fail without an answer between them. After that, no single job is the cause, and all jobs are given up.
Halving finds one job among 2**31."""


class Worker:
    """Owns scheduler and executor, and runs all computation in a thread of its own."""

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        executor: Executor,
        intake: Intake,
        meter: Meter,
        device: Device,
        pipe: Pipe | None = None,
    ) -> None:
        """Start to wait for tickets.

        Args:
            schedulers: One for each lane.
            executor: Computes sweeps.
            intake: Merges tickets into work, and makes results.
            meter: Measures.
            device: The device that computes.
            pipe: The other stages of a pipeline; None: sweeps are computed and answered by the executor.
        """
        self._lanes = [Lane(scheduler) for scheduler in schedulers]
        self._turns = cycle(self._lanes)
        self._executor, self._intake, self._meter, self._pipe = executor, intake, meter, pipe
        self._device = device
        self._arrived: list[Ticket] = []
        self._signal = threading.Condition()
        self._closing = self._cancelling = False
        self._resting = self._borrowed = False
        """Whether the thread waits for work, and whether it must not begin any."""
        self._failures = 0
        """Sweeps that failed since the last answer."""
        self._sweeps = self._prompt_tokens = self._generated = self._counted = self._operations = 0
        self._rows_in_sweep = 0
        self._left = (0, 0)
        self.snapshot = Snapshot()
        self.watch: Callable[[Snapshot], None] | None = None
        """Function that the worker's thread calls after every operation of a sweep."""
        self._thread = threading.Thread(target=self._loop, name="flexgen-helm", daemon=True)
        self._thread.start()

    def put(self, tickets: list[Ticket]) -> None:
        """Submit tickets; they join the next sweep.

        Raises:
            FlexGenError: If the worker was closed.
        """
        release_threads()
        with self._signal:
            if self._closing:
                raise FlexGenError(CLOSED)
            self._arrived.extend(tickets)
            self._signal.notify_all()

    def cancel(self) -> None:
        """Drop all tickets after the current operation; their futures fail."""
        with self._signal:
            if self._closing:
                return
            self._cancelling = True
            self._signal.notify_all()
            self._signal.wait_for(lambda: not self._cancelling or self._closing)

    @contextmanager
    def borrowed(self) -> Iterator[tuple[Scheduler, Executor]]:
        """Give scheduler and executor to the calling thread, once all jobs are answered; jobs that arrive meanwhile wait.

        Raises:
            FlexGenError: If the worker was closed.
        """
        with self._signal:
            self._signal.wait_for(lambda: self._closing or (self._resting and not self._borrowed))
            if self._closing:
                raise FlexGenError(CLOSED)
            self._borrowed = True
        try:
            yield self._lanes[0].scheduler, self._executor
        finally:
            release_threads()
            with self._signal:
                self._borrowed = False
                self._signal.notify_all()

    def close(self) -> None:
        """Stop the thread after the current operation; the futures of all tickets fail."""
        with self._signal:
            self._closing = self._cancelling = True
            self._signal.notify_all()
        self._thread.join()
        self._executor.close()

    def _loop(self) -> None:
        with self._device.current():
            self._serve()

    def _serve(self) -> None:
        lane = self._lanes[0]
        while True:
            with self._signal:
                idle = all(each.is_idle for each in self._lanes)
                while self._borrowed or (idle and not self._arrived and not self._cancelling):
                    self._rest()
            if idle and not self._cancelling:
                time.sleep(GATHER_SECONDS)
            try:
                if self._cancelling:
                    raise _Cancelled
                self._distribute()
                lane = next((each for each in islice(self._turns, len(self._lanes)) if not each.is_idle), lane)
                self._step(lane)
            except BaseException as error:  # callers that wait must get it; the thread itself continues
                self._fail(lane, error)
                if self._closing and not self._cancelling:  # all waiting callers have got the error
                    return

    def _rest(self) -> None:
        release_threads()
        self._resting = True
        self._signal.notify_all()
        self._signal.wait()
        self._resting = False

    def _step(self, lane: Lane) -> None:
        """Answer the lane's sweep that is in flight, and compute its next one."""
        if lane.sweep is not None:
            self._end(lane, lane.sweep)
        self._take_in(lane)
        with self._meter.span("scheduler", Activity("plan")):
            sweep = lane.scheduler.next_sweep()
        self._rows_in_sweep, self._operations = len(sweep.rows), 0
        left = [each.scheduler.tokens_left() for each in self._lanes]
        self._left = sum(tokens for tokens, _ in left), sum(tokens for _, tokens in left)
        lane.sweep = sweep
        if sweep.rows:
            self._compute(sweep)
        if self._pipe is None or not sweep.rows:
            self._end(lane, sweep)

    def _compute(self, sweep: Sweep) -> None:
        with PRECISE_PRODUCTS.hold(), self._pipe.ordered(sweep) if self._pipe is not None else nullcontext():
            self._executor.run(sweep, self._on_logits, self._on_operation)

    def _end(self, lane: Lane, sweep: Sweep) -> None:
        """Account for a sweep that was computed, and give results out."""
        lane.sweep = None
        if sweep.rows:
            if self._pipe is not None:
                self._generated += self._pipe.answer(sweep)
            self._meter.end_sweep(sweep.num_prompt_tokens, sweep.num_decode_tokens, self._generated - self._counted)
            self._counted = self._generated
            self._count(sweep)
        finished = lane.scheduler.end_sweep()
        if not sweep.rows and not finished and lane.scheduler.has_work():
            self._refuse_what_never_fits(lane)
        for work in finished:
            self._give_out(lane.tickets.pop(work))
        for work in [work for work in lane.shared if work in lane.tickets]:
            waiting = lane.tickets[work]
            lane.tickets[work] = [ticket for ticket in waiting if not ticket.answered()]
            self._give_out([ticket for ticket in waiting if ticket.answered()])
        lane.shared = [work for work in lane.shared if len(lane.tickets.get(work, ())) > 1]

    def _give_out(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket.future.set_running_or_notify_cancel():
                try:
                    ticket.future.set_result(self._intake.result(ticket))
                    self._failures = 0
                except Exception as error:  # caused by this ticket alone
                    ticket.future.set_exception(of_one_job(error))

    def _refuse_what_never_fits(self, lane: Lane) -> None:
        """Refuse work that never fits: its jobs fit one by one, but not all completions of their common prompt together."""
        works, capacity = lane.scheduler.abandon(), lane.scheduler.capacity_bytes
        too_large = [work for work in works if lane.scheduler.bytes_needed(len(work.tokens), work.limits) > capacity]
        error = OutOfSpace(
            "One prompt was given with so many different completions that what they keep between sweeps (K and V) never fits "
            "into memory together. Ask for fewer of them at once."
        )
        if not too_large:
            raise error
        for work in too_large:
            _refuse(lane.tickets.pop(work), error)
        lane.scheduler.add([work for work in works if work not in too_large])

    def _distribute(self) -> None:
        with self._signal:
            arrived, self._arrived = self._arrived, []
        distribute(arrived, self._lanes)

    def _take_in(self, lane: Lane) -> None:
        tickets = lane.take_waiting()
        works = self._intake.merge(tickets)
        for ticket in tickets:
            assert ticket.work is not None
            lane.tickets[ticket.work].append(ticket)
        lane.joining = []
        lane.shared += [work for work in works if len(lane.tickets[work]) > 1]
        lane.scheduler.add(works)

    def _on_logits(self, logit_requests: list[LogitRequest], logits: Tensor) -> None:
        answer(logit_requests, logits)
        self._generated += sum(len(request.continuations) for request in logit_requests)

    def _on_operation(self, operation: Operation) -> None:
        if self._cancelling:
            raise _Cancelled
        self._operations += operation.kind == "compute"
        self._publish()

    def _count(self, sweep: Sweep) -> None:
        self._sweeps += 1
        self._prompt_tokens += sweep.num_prompt_tokens
        self._operations = 0
        self._publish()

    def _publish(self) -> None:
        total = self._rows_in_sweep * len(self._executor.layers)
        share = min(1.0, self._operations / total) if total else 0.0
        self.snapshot = Snapshot(self._sweeps, self._prompt_tokens, self._generated, *self._left, share)
        if self.watch is not None:
            self.watch(self.snapshot)

    def _fail(self, lane: Lane, error: BaseException) -> None:
        """Handle a failed sweep: if one job may be the cause, find it by halving, else give up all jobs."""
        self._failures += 1
        if isinstance(error, Exception) and not isinstance(error, NOT_OF_ONE_JOB) and self._failures < MOST_FAILURES:
            self._set_apart(lane, lane.abandon(), error)
            return
        if self._pipe is not None:
            self._pipe.drop([each.sweep for each in self._lanes if each.sweep is not None and each.sweep.rows])
        if isinstance(error, _Cancelled):
            self._executor.use_whole_rows()
            error = FlexGenError("The engine was closed or interrupted before it answered this job. Send the job again.")
        else:
            logger.error("a sweep failed, all jobs are given up: %s: %s", type(error).__name__, error)
        tickets = [ticket for each in self._lanes for ticket in (*each.abandon(), *each.give_up())]
        with self._signal:
            tickets += self._arrived
            self._arrived, self._failures, self._cancelling = [], 0, False
            self._signal.notify_all()
        _refuse(tickets, error)

    def _set_apart(self, lane: Lane, tickets: list[Ticket], error: Exception) -> None:
        """Compute the jobs of a failed sweep again in two halves; a job that fails alone gets the error."""
        if len(tickets) <= 1:
            logger.error("a job failed: %s: %s", type(error).__name__, error)
            _refuse(tickets, of_one_job(error))
            return
        logger.warning(
            "a sweep failed (%s: %s); its %d jobs are computed again in two halves, to find the one that fails",
            *(type(error).__name__, error, len(tickets)),
        )
        for ticket in tickets:
            ticket.begin_anew()
        half = len(tickets) // 2
        lane.apart.extendleft([tickets[half:], tickets[:half]])


def _refuse(tickets: list[Ticket], error: BaseException) -> None:
    for ticket in tickets:
        if ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(error)

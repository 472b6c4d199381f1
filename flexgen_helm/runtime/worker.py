"""Worker: the thread that runs sweeps. It takes tickets in before each sweep and gives results out after it."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from flexgen_helm.errors import CorruptFile, DiskFull, FlexGenError, OutOfSpace
from flexgen_helm.execution.interfaces import Executor
from flexgen_helm.generation.job_errors import of_one_job
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity
from flexgen_helm.runtime.intake import Intake, Ticket, answer
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS
from flexgen_helm.schedule.operations import Operation
from flexgen_helm.schedule.rows import LogitRequest, Sweep
from flexgen_helm.schedule.work import PromptWork, Scheduler

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


NOT_OF_ONE_JOB = (_Cancelled, DiskFull, CorruptFile, OSError)
"""Errors that no single job can cause."""
MOST_FAILURES = 32
"""Sweeps that may fail without an answer between them. After that, no single job is the cause, and all jobs are given up.
Halving finds one job among 2**31."""


class Worker:
    """Owns scheduler and executor, and runs all computation in a thread of its own."""

    def __init__(self, scheduler: Scheduler, executor: Executor, intake: Intake, meter: Meter, device: Device) -> None:
        self._scheduler, self._executor, self._intake, self._meter = scheduler, executor, intake, meter
        self._device = device
        self._arrived: list[Ticket] = []
        self._signal = threading.Condition()
        self._closing = self._cancelling = False
        self._resting = self._borrowed = False
        """Whether the thread waits for work, and whether it must not begin any."""
        self._joining: list[Ticket] = []
        """Tickets on their way from `_arrived` to `_tickets`."""
        self._tickets: dict[PromptWork, list[Ticket]] = defaultdict(list)
        self._apart: deque[list[Ticket]] = deque()
        """Tickets of a sweep that failed, computed group by group, so that only the tickets that cause the error fail."""
        self._failures = 0
        """Sweeps that failed since the last answer."""
        self._shared: list[PromptWork] = []
        """Work for several tickets, some of which may be answered before the others."""
        self._sweeps = self._prompt_tokens = self._generated = self._operations = 0
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
            yield self._scheduler, self._executor
        finally:
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
        while True:
            with self._signal:
                idle = not self._scheduler.has_work() and not self._apart
                while self._borrowed or (idle and not self._arrived and not self._cancelling):
                    self._rest()
            if idle and not self._cancelling:
                time.sleep(GATHER_SECONDS)
            try:
                if self._cancelling:
                    raise _Cancelled
                self._step()
            except BaseException as error:  # callers that wait must get it; the thread itself continues
                self._fail(error)
                if self._closing and not self._cancelling:  # all waiting callers have got the error
                    return

    def _rest(self) -> None:
        self._resting = True
        self._signal.notify_all()
        self._signal.wait()
        self._resting = False

    def _step(self) -> None:
        self._take_in()
        with self._meter.span("scheduler", Activity("plan")):
            sweep = self._scheduler.next_sweep()
        self._rows_in_sweep, self._operations, self._left = len(sweep.rows), 0, self._scheduler.tokens_left()
        if sweep.rows:
            before = self._generated
            with PRECISE_PRODUCTS.hold():
                self._executor.run(sweep, self._on_logits, self._on_operation)
            self._meter.end_sweep(sweep.num_prompt_tokens, sweep.num_decode_tokens, self._generated - before)
            self._count(sweep)
        finished = self._scheduler.end_sweep()
        if not sweep.rows and not finished and self._scheduler.has_work():
            self._refuse_what_never_fits()
        for work in finished:
            self._give_out(self._tickets.pop(work))
        for work in [work for work in self._shared if work in self._tickets]:
            waiting = self._tickets[work]
            self._tickets[work] = [ticket for ticket in waiting if not ticket.answered()]
            self._give_out([ticket for ticket in waiting if ticket.answered()])
        self._shared = [work for work in self._shared if len(self._tickets.get(work, ())) > 1]

    def _give_out(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket.future.set_running_or_notify_cancel():
                try:
                    ticket.future.set_result(self._intake.result(ticket))
                    self._failures = 0
                except Exception as error:  # caused by this ticket alone
                    ticket.future.set_exception(of_one_job(error))

    def _refuse_what_never_fits(self) -> None:
        """Refuse work that never fits: its jobs fit one by one, but not all completions of their common prompt together."""
        works, capacity = self._scheduler.abandon(), self._scheduler.capacity_bytes
        too_large = [work for work in works if self._scheduler.bytes_needed(len(work.tokens), work.limits) > capacity]
        error = OutOfSpace(
            "One prompt was given with so many different completions that what they keep between sweeps (K and V) never fits "
            "into memory together. Ask for fewer of them at once."
        )
        if not too_large:
            raise error
        for work in too_large:
            _refuse(self._tickets.pop(work), error)
        self._scheduler.add([work for work in works if work not in too_large])

    def _take_in(self) -> None:
        with self._signal:
            if not self._apart:
                self._joining, self._arrived = self._arrived, []
            elif not self._tickets:
                self._joining = self._apart.popleft()
        works = self._intake.merge(self._joining)
        for ticket in self._joining:
            assert ticket.work is not None
            self._tickets[ticket.work].append(ticket)
        self._joining = []
        self._shared += [work for work in works if len(self._tickets[work]) > 1]
        self._scheduler.add(works)

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
        total = self._rows_in_sweep * self._executor.num_layers
        share = min(1.0, self._operations / total) if total else 0.0
        self.snapshot = Snapshot(self._sweeps, self._prompt_tokens, self._generated, *self._left, share)
        if self.watch is not None:
            self.watch(self.snapshot)

    def _fail(self, error: BaseException) -> None:
        """Handle a failed sweep: if one job may be the cause, find it by halving, else give up all jobs."""
        self._scheduler.abandon()
        tickets = self._joining + [ticket for waiting in self._tickets.values() for ticket in waiting]
        self._tickets.clear()
        self._joining, self._shared = [], []
        self._failures += 1
        if isinstance(error, Exception) and not isinstance(error, NOT_OF_ONE_JOB) and self._failures < MOST_FAILURES:
            self._set_apart(tickets, error)
            return
        if isinstance(error, _Cancelled):
            self._executor.use_whole_rows()
            error = FlexGenError("The engine was closed or interrupted before it answered this job. Send the job again.")
        else:
            logger.error("a sweep failed, all jobs are given up: %s: %s", type(error).__name__, error)
        with self._signal:
            tickets += [ticket for group in self._apart for ticket in group] + self._arrived
            self._arrived, self._failures, self._cancelling = [], 0, False
            self._apart.clear()
            self._signal.notify_all()
        _refuse(tickets, error)

    def _set_apart(self, tickets: list[Ticket], error: Exception) -> None:
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
        self._apart.extendleft([tickets[half:], tickets[:half]])


def _refuse(tickets: list[Ticket], error: BaseException) -> None:
    for ticket in tickets:
        if ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(error)

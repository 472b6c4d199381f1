"""What the first stage of a pipeline orders from the others, and what it is answered."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flexgen_helm.distributed.channel import Delivery
from flexgen_helm.distributed.group import StageGroup
from flexgen_helm.distributed.messages import Close, SweepError, SweepOrder, SweepReply, mark, plain_rows
from flexgen_helm.distributed.neighbours import StageNeighbours
from flexgen_helm.errors import FlexGenError, StageLost
from flexgen_helm.runtime.intake import apply, question
from flexgen_helm.schedule.rows import LogitRequest, Sweep

logger = logging.getLogger(__name__)

COMPUTED = "%s computed for %.1f s, in %d sweeps"
"""What a stage says at its end: stages that computed much longer than others have too many layers."""


class StagePipe:
    """The other stages. It is a `flexgen_helm.runtime.worker.Pipe`. One thread uses it."""

    def __init__(self, group: StageGroup, neighbours: StageNeighbours) -> None:
        """Order nothing yet."""
        self._group, self._neighbours = group, neighbours
        self._numbers: dict[int, int] = {}
        """Numbers of the sweeps that were ordered and not answered, by the sweep's `id`."""
        self._ordered, self._seconds = 0, 0.0
        self._answered = -1
        """Number of the last sweep that the last stage answered."""
        self._replies: dict[int, SweepReply] = {}
        self._errors: dict[int, tuple[int, SweepError]] = {}
        """For sweeps that failed the stage and its error."""
        self._leaving: deque[tuple[int, list[Delivery]]] = deque()

    @contextmanager
    def ordered(self, sweep: Sweep) -> Iterator[None]:
        """See `Pipe`."""
        number, self._ordered = self._ordered, self._ordered + 1
        rows, last = plain_rows(sweep.rows), self._group.count - 1
        questions = tuple(question(request) for request in _requests(sweep))
        for stage in range(1, self._group.count):
            order = SweepOrder(number, rows, sweep.pages, self._answered, questions if stage == last else ())
            self._leaving.append((number, self._group.send(order, stage)))
        self._numbers[id(sweep)] = number
        self._neighbours.begin_sweep(number, rows, delivered=self._answered)
        begun = time.perf_counter()
        try:
            yield
            self._seconds += time.perf_counter() - begun
        except StageLost:
            raise
        except BaseException:
            self._neighbours.give_up(sends=True)
            self._reply(self._numbers.pop(id(sweep)))
            raise

    def answer(self, sweep: Sweep) -> int:
        """See `Pipe`."""
        number = self._numbers.pop(id(sweep))
        reply = self._reply(number)
        if reply.failed:
            raise self._error(number)
        mark(sweep.rows, reply.bad)
        requests = list(_requests(sweep))
        apply(requests, reply.replies)
        return sum(len(request.continuations) for request in requests)

    def drop(self, sweeps: Sequence[Sweep]) -> None:
        """See `Pipe`."""
        for sweep in sweeps:
            number = self._numbers.pop(id(sweep), None)
            if number is not None and not self._group.is_broken:
                self._reply(number)

    def close(self) -> None:
        """Let the other stages close their parts of the engine."""
        if not self._group.is_broken:
            for stage in range(1, self._group.count):
                self._group.send_and_wait(Close(), stage)
            self._neighbours.close()
            logger.info(COMPUTED, self._group.name(0), self._seconds, self._ordered)

    def _reply(self, number: int) -> SweepReply:
        """Wait for the reply to a sweep; the last stage replies in the order of the sweeps."""
        while number not in self._replies:
            self._take()
        while self._leaving and self._leaving[0][0] <= self._answered:
            self._group.wait_for(self._leaving.popleft()[1])
        return self._replies.pop(number)

    def _error(self, number: int) -> FlexGenError:
        """Wait for the error of the stage that failed."""
        while number not in self._errors:
            self._take()
        stage, error = self._errors.pop(number)
        self._errors = {later: found for later, found in self._errors.items() if later > number}
        return error.error(self._group.name(stage))

    def _take(self) -> None:
        message = self._group.next_message()
        if isinstance(message, SweepReply):
            self._replies[message.number], self._answered = message, message.number
        elif isinstance(message, SweepError):
            self._errors.setdefault(message.number, (message.stage, message))


def _requests(sweep: Sweep) -> Iterator[LogitRequest]:
    return (request for row in sweep.rows for request in row.logit_requests())

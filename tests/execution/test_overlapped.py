"""The overlapped executor waits for what `schedule.dependencies.needs` names, and for nothing else.

Model, weights and hidden states are fakes, whose transfers end when the test says so.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.execution.overlapped import OverlappedExecutor
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.schedule.dependencies import QUEUES, needs
from flexgen_helm.schedule.operations import ORDERS, Operation, Order, head_unit, sweep_operations
from flexgen_helm.schedule.rows import LogitRequest, Row, Segment, Sweep

Pace = Literal["at once", "late", "any"]
"""When transfers run: as soon as they are started, only when somebody waits for them, or at random."""


@dataclass(frozen=True)
class Case:
    """A sweep to be computed."""

    order: Order
    num_layers: int
    num_rows: int
    suspending: frozenset[int]
    streamed: frozenset[int]
    num_slots: int

    def operations(self) -> list[Operation]:
        kwargs: Any = {"streamed": self.streamed, "num_slots": self.num_slots}
        return list(sweep_operations(self.order, self.num_layers, self.num_rows, **kwargs))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_layers, num_rows = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    streamed = draw(st.frozensets(st.integers(0, head_unit(num_layers))))
    num_slots = draw(st.integers(1, len(streamed))) if streamed else 0
    suspending = draw(st.frozensets(st.integers(0, num_rows - 1)))
    return Case(draw(st.sampled_from(sorted(ORDERS))), num_layers, num_rows, suspending, streamed, num_slots)


class Log:
    """Sees every operation begin and end, and compares."""

    def __init__(self, case: Case, pace: Pace, seed: int) -> None:
        self.case, self.pace, self._random = case, pace, random.Random(seed)
        self.operations = case.operations()
        self._needs = list(needs(self.operations, suspending=case.suspending))
        self._numbers: dict[Operation, deque[int]] = defaultdict(deque)
        for number, operation in enumerate(self.operations):
            self._numbers[operation].append(number)
        self.ended: set[int] = set()
        self.queues = {name: Queue(self) for name in QUEUES.values()}
        self._behind: dict[int, frozenset[int]] = {}
        """For each operation itself and all that must have ended before it, those before it in its queue included."""
        self._explained: set[int] = set()
        """Operations for which those that have begun had to wait."""

    def number(self, operation: Operation) -> int:
        """The number of an operation that is asked for now."""
        return self._numbers[operation].popleft()

    def ask(self, number: int, before: int | None = None) -> None:
        """Note that an operation is asked for, behind another one in its queue."""
        needed = frozenset[int]().union(*(self._behind[other] for other in self._needs[number]))
        self._behind[number] = needed | {number} | (self._behind[before] if before is not None else frozenset())
        stores = self.operations[number].kind in ("store_cache", "store_hidden")
        if self.pace == "late":
            # A store that was put off until its call ended comes after work of the device that it does not need.
            ended = {n for n in self.ended if not stores or self._ends_late(self.operations[n])}
            unexplained = [self.operations[n] for n in sorted(ended - self._explained - needed)]
            assert not unexplained, f"{self.operations[number]} waits for {unexplained}"
        if not stores:  # nothing is ended for their sake
            self._explained |= needed

    def begin(self, number: int) -> None:
        """Note that an operation begins."""
        missing = [self.operations[n] for n in sorted(self._needs[number] - self.ended)]
        assert not missing, f"{self.operations[number]} begins before {missing} have ended"

    def perform(self, operation: Operation) -> int:
        """Ask for an operation that begins at once."""
        number = self.number(operation)
        self.ask(number)
        self.begin(number)
        self.let_run()
        return number

    def _ends_late(self, operation: Operation) -> bool:
        return operation.kind in QUEUES or (operation.kind == "compute" and operation.k in self.case.suspending)

    def let_run(self) -> None:
        """Let transfers run as the pace says."""
        for queue in self.queues.values():
            if self.pace != "late":
                queue.run(len(queue) if self.pace == "at once" else self._random.randint(0, 2))


class Queue:
    """Transfers, one after the other."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting: deque[int] = deque()
        self._last: int | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, operation: Operation) -> Moving:
        number = self._log.number(operation)
        self._log.ask(number, self._last)
        self._waiting.append(number)
        self._last = number
        self._log.let_run()
        return Moving(self, number)

    def run(self, count: int) -> None:
        for _ in range(min(count, len(self._waiting))):
            number = self._waiting.popleft()
            self._log.begin(number)
            self._log.ended.add(number)

    def run_to(self, number: int) -> None:
        if number in self._waiting:
            self.run(self._waiting.index(number) + 1)


@dataclass(frozen=True)
class Moving:
    """A transfer."""

    queue: Queue
    number: int

    def wait(self) -> None:
        self.queue.run_to(self.number)


@dataclass
class FakeRecording:
    k: int
    hidden: Tensor | None = field(default_factory=lambda: torch.zeros(1, 1))
    hidden_moves: bool = True
    cache: dict[int, Moving] = field(default_factory=dict)

    @property
    def tokens(self) -> Tensor:
        assert self.hidden is not None
        return self.hidden


class FakeRows:
    """Rows that compute nothing, some of which are suspended."""

    can_be_halved = True

    def __init__(self, log: Log) -> None:
        self._log = log
        self.num_layers = log.case.num_layers
        self.layers: dict[int, int] = {}
        """The layer of each row."""
        self._suspend: Callable[[], None] = lambda: None
        self._rows: list[Row] = []

    def reserve(self, sweep: Sweep) -> None:
        self._rows = sweep.rows

    def record(self, row: Row) -> FakeRecording:
        k = next(k for k, other in enumerate(self._rows) if other is row)
        self.layers[k] = -1
        self._log.ended.add(self._log.perform(Operation("record", -1, k)))
        return FakeRecording(k)

    def load_cache(self, j: int, recording: FakeRecording) -> Moving:
        recording.cache[j] = self._log.queues["cache"].submit(Operation("load_cache", j, recording.k))
        return recording.cache[j]

    def store_cache(self, j: int, recording: FakeRecording) -> Moving:
        return self._log.queues["cache"].submit(Operation("store_cache", j, recording.k))

    def replay(self, j: int, recording: FakeRecording) -> None:
        self.layers[recording.k] = j
        recording.cache.pop(j).wait()
        number = self._log.perform(Operation("compute", j, recording.k))
        if recording.k in self._log.case.suspending:
            for _ in range(1 + (j + recording.k) % 2):
                self._suspend()
        self._log.ended.add(number)

    def use_suspender(self, suspend: Callable[[], None]) -> None:
        self._suspend = suspend

    def bad_tokens(self, recording: FakeRecording) -> None:
        pass

    def finish(self, hidden: Tensor) -> Tensor:
        self._log.ended.add(self._log.perform(Operation("finish", head_unit(self.num_layers))))
        return hidden

    def close(self) -> None:
        pass


class FakeHidden:
    """Hidden states that are all stored elsewhere."""

    def __init__(self, log: Log, rows: FakeRows) -> None:
        self._queue, self._layers = log.queues["hidden"], rows.layers
        self._arriving: dict[int, Moving] = {}

    def begin_sweep(self, num_rows: int) -> None:
        pass

    def store(self, k: int, hidden: Tensor) -> Moving:
        return self._queue.submit(Operation("store_hidden", self._layers[k], k))

    def load(self, k: int) -> Moving:
        self._arriving[k] = self._queue.submit(Operation("load_hidden", self._layers[k] + 1, k))
        return self._arriving[k]

    def take(self, k: int) -> Tensor:
        self._arriving.pop(k).wait()
        return torch.zeros(1, 1)


class FakeWeights:
    """Weights of the units that are streamed."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.streamed, self.num_slots = log.case.streamed, log.case.num_slots
        self._loads: dict[int, Moving] = {}

    def begin(self, j: int) -> None:
        self._loads[j] = self._log.queues["weights"].submit(Operation("load_weights", j))

    def finish(self, j: int) -> None:
        self._loads[j].wait()

    def use(self, j: int) -> None:
        self._loads[j].wait()

    def release(self, j: int) -> None:
        self._log.ended.add(self._log.perform(Operation("release_weights", j)))

    def release_all(self) -> None:
        pass


def compute(case: Case, pace: Pace, seed: int = 0, kind: type[SerialExecutor[FakeRecording]] = OverlappedExecutor) -> None:
    """Compute a sweep, and compare what begins and ends in it with what is needed."""
    log = Log(case, pace, seed)
    rows = FakeRows(log)
    stores: Any = {"weights": FakeWeights(log), "hidden": FakeHidden(log, rows)}
    requested = [LogitRequest(0, (), ())]
    sweep = Sweep([Row("decode", 16, [Segment((1,), 0, logit_requests=requested)]) for _ in range(case.num_rows)])
    performed: list[Operation] = []
    kind(rows, head_slice=64, order=case.order, **stores).run(sweep, lambda requests, logits: None, performed.append)
    assert performed == log.operations
    for queue in log.queues.values():
        queue.run(len(queue))
    assert log.ended == set(range(len(log.operations)))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(cases(), st.sampled_from(["at once", "any"]), st.integers(0, 2**16))
def test_what_an_operation_needs_has_ended_when_it_begins(case: Case, pace: Pace, seed: int) -> None:
    compute(case, pace, seed)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(cases())
def test_nothing_is_waited_for_before_it_is_needed(case: Case) -> None:
    compute(case, "late")


@settings(derandomize=True, max_examples=30, deadline=None)
@given(cases(), st.sampled_from(["at once", "any"]), st.integers(0, 2**16))
def test_the_serial_executor_obeys_the_same_rules(case: Case, pace: Pace, seed: int) -> None:
    compute(case, pace, seed, SerialExecutor)


def test_the_serial_executor_waits_for_more() -> None:
    case = Case("zigzag", 2, 2, frozenset(), frozenset((0, 1)), 2)
    with pytest.raises(AssertionError, match="waits for"):
        compute(case, "late", kind=SerialExecutor)

"""Tasks on resources that are shared: what runs at the same time on one of them gets equal parts of it. No torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from flexgen_helm.policy.planner.durations import Stage

OPPOSITE: Mapping[str, str] = {"host_to_device": "device_to_host", "device_to_host": "host_to_device"}
"""The other direction of a link."""
LEAST = 1e-12
"""Seconds that count as none: sums of floats differ by as much."""


class Span(NamedTuple):
    """An interval in which a resource worked.

    Attributes:
        name: What it did.
        resource: The resource.
        begin: Begin in seconds.
        end: End in seconds.
    """

    name: str
    resource: str
    begin: float
    end: float


class Mark(NamedTuple):
    """What a clock has seen until a moment.

    Attributes:
        seconds: The moment.
        moved: Bytes that each resource has moved.
        busy: Seconds in which each resource did at least one thing.
    """

    seconds: float
    moved: Mapping[str, float]
    busy: Mapping[str, float]

    def since(self, other: Mark) -> Mark:
        """Return what was seen since another mark."""
        return self.plus(other, -1.0)

    def plus(self, other: Mark, factor: float = 1.0) -> Mark:
        """Return the sum of this and of the other one so many times."""
        moved, busy = (
            {name: a.get(name, 0) + factor * b.get(name, 0) for name in {**a, **b}}
            for a, b in ((self.moved, other.moved), (self.busy, other.busy))
        )
        return Mark(self.seconds + factor * other.seconds, moved, busy)


class Task:
    """Stages, one after the other, that begin when other tasks have ended."""

    __slots__ = ("begin", "end", "followers", "left", "name", "stages", "waits_for")

    def __init__(self, name: str, stages: Sequence[Stage]) -> None:
        self.name, self.stages = name, list(stages)[::-1]
        self.followers: list[Task] = []
        self.waits_for = 0
        self.left = self.begin = 0.0
        self.end: float | None = None


class Fluid:
    """A clock on which tasks run. Tasks may be added while others run."""

    def __init__(self, *, duplex: float = 1.0, spans: list[Span] | None = None) -> None:
        """Nothing runs.

        Args:
            duplex: See `flexgen_helm.machine.profile.MachineProfile`.
            spans: Takes what every resource does; None: nobody asks.
        """
        self.now = 0.0
        self.moved: dict[str, int] = defaultdict(int)
        """Bytes that each resource has moved."""
        self.busy: dict[str, float] = defaultdict(float)
        """Seconds in which each resource did at least one thing."""
        self._duplex, self._spans = duplex, spans
        self._active: list[Task] = []
        self._alarms: list[tuple[float, int, Task]] = []
        """What ends at a moment, the next one first."""

    def add(self, name: str, stages: Sequence[Stage], after: Iterable[Task | None]) -> Task:
        """Add a task.

        Args:
            name: What it does.
            stages: Its work; it may be none.
            after: Tasks that must have ended before it begins.
        """
        task = Task(name, stages)
        for other in after:
            if other is not None and other.end is None:
                other.followers.append(task)
                task.waits_for += 1
        if not task.waits_for:
            self._go_on(task)
        return task

    def at(self, seconds: float) -> Task | None:
        """Return a task that ends at a moment, for others to wait for; None: it has passed."""
        if seconds <= self.now + LEAST:
            return None
        task = Task("", [])
        heappush(self._alarms, (seconds, id(task), task))
        return task

    def run_out(self) -> float:
        """Let time go on until nothing runs; returns when that is."""
        while self._active or self._alarms:
            self._step()
        return self.now

    def run_to(self, task: Task) -> float:
        """Let time go on until a task has ended; returns when that is."""
        while task.end is None:
            assert self._active or self._alarms, f"{task.name} waits for something that never ends"
            self._step()
        return task.end

    def mark(self, task: Task | None = None) -> Mark:
        """Return what was seen until now, or until a task has ended."""
        if task is not None:
            self.run_to(task)
        return Mark(self.now, dict(self.moved), dict(self.busy))

    def _step(self) -> None:
        """Go on to the next end of a stage, or to the next moment for which something waits."""
        active = self._active
        rates = [1.0] if len(active) == 1 else self._rates()
        passed = min((task.left / rate for task, rate in zip(active, rates, strict=True)), default=math.inf)
        if self._alarms:
            passed = min(passed, self._alarms[0][0] - self.now)
        self.now += passed
        for task, rate in zip(active, rates, strict=True):
            task.left -= passed * rate
        for resource in {task.stages[-1].resource for task in active}:
            self.busy[resource] += passed
        ended = [task for task in active if task.left <= LEAST]
        self._active = [task for task in active if task.left > LEAST]
        for task in ended:
            stage = task.stages.pop()
            self.moved[stage.resource] += stage.num_bytes
            if self._spans is not None:
                self._spans.append(Span(task.name, stage.resource, task.begin, self.now))
            self._go_on(task)
        while self._alarms and self._alarms[0][0] <= self.now + LEAST:
            self._go_on(heappop(self._alarms)[2])

    def _rates(self) -> list[float]:
        """Return how fast each active task runs, as a share of its speed alone."""
        users: dict[str, int] = defaultdict(int)
        for task in self._active:
            users[task.stages[-1].pool] += 1
        rates = []
        for task in self._active:
            pool = task.stages[-1].pool
            both = OPPOSITE.get(pool, pool) in users and pool in OPPOSITE
            rates.append((self._duplex if both else 1.0) / users[pool])
        return rates

    def _go_on(self, task: Task) -> None:
        """Begin the next stage of a task, or end it and begin what waited for it alone."""
        todo = [task]
        while todo:
            task = todo.pop()
            while task.stages and task.stages[-1].seconds <= LEAST:
                stage = task.stages.pop()
                self.moved[stage.resource] += stage.num_bytes
            if task.stages:
                task.left, task.begin = task.stages[-1].seconds, self.now
                self._active.append(task)
                continue
            task.end = self.now
            for follower in task.followers:
                follower.waits_for -= 1
                if not follower.waits_for:
                    todo.append(follower)
            task.followers = []

"""A virtual clock: time jumps from event to event, and threads are greenlets that wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet

from flexgen_helm.policy.planner.durations import Stage

TINY = 1e-9


@dataclass(eq=False)
class Work:
    """Something that takes time, alone so many seconds."""

    pool: str
    left: float


class Clock:
    """Time, and who waits for it."""

    def __init__(self, duplex: float) -> None:
        self.now, self._duplex = 0.0, duplex
        self._running: list[Work] = []
        self._waiting: list[tuple[greenlet, Callable[[], bool]]] = []
        self._loop: greenlet | None = None

    def spend(self, stage: Stage) -> None:
        """Work on one stage until it is done."""
        if stage.seconds > 0:
            work = Work(stage.pool, stage.seconds)
            self._running.append(work)
            self.wait(lambda: work not in self._running)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Let the others go on until something is true."""
        if self._loop is not None and getcurrent() is not self._loop:
            self._waiting.append((getcurrent(), ready))
            self._loop.switch()
            return
        outer, self._loop = self._loop, getcurrent()
        while not ready():
            if not self._resume():
                self._advance()
        self._loop = outer

    def _resume(self) -> bool:
        """Let one go on that need not wait any more."""
        for each in self._waiting:
            if each[1]():
                self._waiting.remove(each)
                each[0].parent = getcurrent()  # where it comes to when it ends
                each[0].switch()
                return True
        return False

    def start(self, work: Callable[[], None]) -> None:
        """Let something go on beside the others."""
        self._waiting.append((greenlet(work), lambda: True))

    def _advance(self) -> None:
        assert self._running, "all wait for each other"
        speeds = {id(work): self._speed(work) for work in self._running}
        passed = min(work.left / speeds[id(work)] for work in self._running)
        self.now += passed
        for work in self._running:
            work.left -= passed * speeds[id(work)]
        self._running = [work for work in self._running if work.left > TINY]

    def _speed(self, work: Work) -> float:
        pools = [other.pool for other in self._running]
        both = {"host_to_device", "device_to_host"} <= {*pools} and work.pool.endswith(("to_device", "to_host"))
        return (self._duplex if both else 1.0) / pools.count(work.pool)


class Promise:
    """A future, or a transfer."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._done = clock, False
        self._callbacks: list[Callable[[Any], None]] = []

    def end(self) -> None:
        self._done = True
        for callback in self._callbacks:
            callback(self)

    def done(self) -> bool:
        return self._done

    def wait(self) -> None:
        if not self._done:
            self._clock.wait(self.done)

    def result(self) -> None:
        self.wait()

    def exception(self) -> None:
        self.wait()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)


class PacedQueue:
    """A thread that does one thing after the other, in the place of `flexgen_helm.memory.link.Link`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._todo: deque[tuple[Callable[[], None], Promise]] = deque()
        self._works = False

    def submit(self, work: Callable[[], None]) -> Promise:
        promise = Promise(self._clock)
        self._todo.append((work, promise))
        if not self._works:
            self._works = True
            self._clock.start(self._run)
        return promise

    def _run(self) -> None:
        while self._todo:
            work, promise = self._todo.popleft()
            work()
            promise.end()
        self._works = False

    def close(self) -> None:
        pass

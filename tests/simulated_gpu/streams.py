"""Streams and events of the simulated GPU, with as much of torch's interface as there is use for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from tests.simulated_gpu.clocks import Agent, Clock
from tests.simulated_gpu.gpu import SimulatedGpu

OfGpu = TypeVar("OfGpu", "Stream", "Event")


def bound(kind: type[OfGpu], gpu: SimulatedGpu) -> type[OfGpu]:
    """The class for one device: torch makes streams and events without naming it."""
    return type(kind.__name__, (kind,), {"gpu": gpu})


class Stream:
    """``torch.cuda.Stream``."""

    gpu: ClassVar[SimulatedGpu]

    def __init__(self, device: Any = None, priority: int = 0, *, agent: Agent | None = None) -> None:
        self.agent = agent or self.gpu.new_stream()

    def wait_event(self, event: Event) -> None:
        with self.gpu.lock:
            self.agent.learn(event.clock)

    def wait_stream(self, other: Stream) -> None:
        with self.gpu.lock:
            self.agent.learn(other.agent.known)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or bound(Event, self.gpu)()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.gpu.wait(self.agent.known, "stream.synchronize")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.agent is self.agent

    def __hash__(self) -> int:
        return hash(self.agent)


class Event:
    """``torch.cuda.Event``. Its times are those of the host."""

    gpu: ClassVar[SimulatedGpu]

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.clock: Clock = {}
        self._timed = enable_timing
        self._when: float | None = None
        self._asked = False

    def record(self, stream: Stream | None = None) -> None:
        with self.gpu.lock:
            agent = stream.agent if stream is not None else self.gpu.stream
            agent.learn(self.gpu.thread.known)
            self.clock, self._when, self._asked = dict(agent.known), time.perf_counter(), False

    def wait(self, stream: Stream | None = None) -> None:
        with self.gpu.lock:
            (stream.agent if stream is not None else self.gpu.stream).learn(self.clock)

    def synchronize(self) -> None:
        self.gpu.wait(self.clock, "event.synchronize")

    def query(self) -> bool:
        """A device lags behind its host: the first answer is no, unless the thread knows better."""
        with self.gpu.lock:
            known = self.gpu.thread.known
            if not self._asked and any(known.get(agent, -1) < count for agent, count in self.clock.items()):
                self._asked = True
                return False
            self.gpu.thread.learn(self.clock)
            return True

    def elapsed_time(self, end: Event) -> float:
        if not (self._timed and end._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._when is None or end._when is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end._when - self._when) * 1e3


@contextmanager
def use_stream(gpu: SimulatedGpu, stream: Stream | None) -> Iterator[None]:
    """``torch.cuda.stream``."""
    before = gpu.stream
    gpu.stream = stream.agent if stream is not None else before
    try:
        yield
    finally:
        gpu.stream = before

"""Layer calls that are suspended while the CPU attends for them, so that the device computes another row meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from greenlet import getcurrent, greenlet

from flexgen_helm.schedule.dependencies import MOST_SUSPENDED


@dataclass(eq=False)
class _Call:
    k: int
    run: greenlet
    busy: Callable[[], AbstractContextManager[None]]
    left: list[Callable[[], None]] = field(default_factory=list)
    """Work that follows it."""

    def go_on(self) -> None:
        with self.busy():
            self.run.switch()


class SuspendedCalls:
    """Calls of one layer, each for a row of its own, of which some wait in `suspend`."""

    def __init__(self) -> None:
        """Nothing is suspended yet."""
        self._calls: deque[_Call] = deque()

    def run(self, k: int, call: Callable[[], None], busy: Callable[[], AbstractContextManager[None]]) -> None:
        """Run a row's call to its end, or to where it is suspended; earlier ones end first if there are too many then.

        Args:
            k: The row.
            call: Its call.
            busy: Entered whenever the device computes for it.
        """
        started = _Call(k, greenlet(call, getcurrent()), busy)
        self._calls.append(started)
        started.go_on()
        if started.run.dead:
            self._calls.remove(started)
        while len(self._calls) > MOST_SUSPENDED:
            self._end_first()

    def suspend(self) -> None:
        """Let something else be computed, if one of these calls asks for it; returns when its end is needed."""
        running = getcurrent()
        # Not kept in a field: a thread whose main greenlet outlives it takes 50 ms to end.
        if running.parent is not None and any(call.run is running for call in self._calls):
            running.parent.switch()

    def defer(self, k: int, work: Callable[[], None]) -> bool:
        """Return whether the call of row k is suspended; then the work is done when it has ended."""
        for call in self._calls:
            if call.k == k:
                call.left.append(work)
                return True
        return False

    def end(self, k: int | None = None) -> None:
        """Bring the call of row k to its end, with those before it; None: all of them."""
        while self._calls and (k is None or k in {call.k for call in self._calls}):
            self._end_first()

    def drop(self) -> None:
        """Give up what is suspended: after an error it would keep its tensors."""
        while self._calls:
            self._calls.popleft().run.throw()

    def _end_first(self) -> None:
        call = self._calls[0]
        while not call.run.dead:
            call.go_on()
        self._calls.popleft()
        for work in call.left:
            work()

"""Layer calls that rest while the CPU attends for them, so that the device computes another row meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from greenlet import greenlet

MOST_RESTING = 1
"""Calls that rest beside the one that runs: each holds its row's activations, and the CPU works for one at a time."""


@dataclass(eq=False)
class _Call:
    k: int
    run: greenlet
    busy: Callable[[], AbstractContextManager[None]]
    left: list[Callable[[], None]] = field(default_factory=list)
    """What follows it."""

    def go_on(self) -> None:
        with self.busy():
            self.run.switch()


class RestingCalls:
    """Calls of one layer, each for a row of its own, of which some wait at `flexgen_helm.attention.host.rest`."""

    def __init__(self) -> None:
        """Nothing rests."""
        self._resting: deque[_Call] = deque()

    def run(self, k: int, call: Callable[[], None], busy: Callable[[], AbstractContextManager[None]]) -> None:
        """Run a row's call to its end, or to where it rests; earlier ones end first if too many would rest.

        Args:
            k: The row.
            call: Its call.
            busy: Entered whenever the device computes for it.
        """
        started = _Call(k, greenlet(call), busy)
        self._resting.append(started)
        started.go_on()
        if started.run.dead:
            self._resting.remove(started)
        while len(self._resting) > MOST_RESTING:
            self._end_first()

    def defer(self, k: int, work: Callable[[], None]) -> bool:
        """Whether the call of row k rests; then the work is done when it has ended."""
        for call in self._resting:
            if call.k == k:
                call.left.append(work)
                return True
        return False

    def end(self, k: int | None = None) -> None:
        """Bring the call of row k to its end, with those before it; None: all of them."""
        while self._resting and (k is None or k in {call.k for call in self._resting}):
            self._end_first()

    def drop(self) -> None:
        """Give up what rests: after an error it would keep its tensors."""
        while self._resting:
            self._resting.popleft().run.throw()

    def _end_first(self) -> None:
        call = self._resting[0]
        while not call.run.dead:
            call.go_on()
        self._resting.popleft()
        for work in call.left:
            work()

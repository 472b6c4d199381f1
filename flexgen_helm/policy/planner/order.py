"""The order in which an executor performs operations, where layer calls are suspended. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from flexgen_helm.schedule.dependencies import needs
from flexgen_helm.schedule.operations import Operation


class Performed(NamedTuple):
    """An operation that is performed, or begun if it is suspended.

    Attributes:
        operation: The operation.
        number: Its number in the order of the schedule.
        needs: Numbers of those that must have ended before, from `flexgen_helm.schedule.dependencies.needs`.
        suspends: Whether it is a layer call that waits for the CPU in its middle.
    """

    operation: Operation
    number: int
    needs: frozenset[int]
    suspends: bool

    @property
    def kind(self) -> str:
        """The operation's kind."""
        return self.operation.kind

    @property
    def j(self) -> int:
        """Its unit."""
        return self.operation.j

    @property
    def k(self) -> int:
        """Its row."""
        return self.operation.k


class Resumed(NamedTuple):
    """A layer call that goes on to its end.

    Attributes:
        number: The operation's number.
    """

    number: int


def performed(operations: Iterable[Operation], suspending: frozenset[int]) -> Iterator[Performed | Resumed]:
    """Yield what an executor does, in its order.

    A suspended call goes on when something needs its end that is not its own store; its stores follow it
    (`flexgen_helm.execution.suspended_calls`).

    Args:
        operations: All of a sweep, in their order.
        suspending: Rows whose calls are suspended while the CPU attends.
    """
    listed = list(operations)
    suspended: dict[int, list[Performed]] = {}
    for number, (operation, needed) in enumerate(zip(listed, needs(listed, suspending=suspending), strict=True)):
        suspends = operation.kind == "compute" and operation.k in suspending
        step = Performed(operation, number, needed, suspends)
        if suspended:
            is_store = operation.kind in ("store_cache", "store_hidden")
            own = [m for m in suspended if is_store and m in needed and listed[m].k == operation.k]
            forced = [m for m in suspended if m in needed and m not in own]
            while forced and forced[-1] in suspended:
                yield from _ended(suspended, next(iter(suspended)))
            if own:
                suspended[own[-1]].append(step)
                continue
        yield step
        if suspends:
            suspended[number] = []
    while suspended:
        yield from _ended(suspended, next(iter(suspended)))


def _ended(suspended: dict[int, list[Performed]], number: int) -> Iterator[Performed | Resumed]:
    yield Resumed(number)
    yield from suspended.pop(number)

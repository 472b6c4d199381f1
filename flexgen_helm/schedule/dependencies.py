"""Dependencies of operations as plain data: what must have ended before each of them may begin.

The overlapped executor obeys these rules (`tests/execution/test_overlapped.py` compares the two), and a simulator of time
follows them. Operations are told by their number in the order of `sweep_operations`, since a unit's weights may be loaded
more than once.

* The device does what it was given in order: an operation follows every `record`, `compute` and `finish` before it.
* A row in ``suspending`` is the exception. Its `compute` waits for the CPU's attention, and what is not about that row goes
  on meanwhile. It has ended before the same row is loaded again, before the layer changes, before weights are released,
  before `finish`, and once a second call is suspended behind it.
* A `compute` follows the loads of its layer's weights and of its row; `finish` follows the load of the head's weights.
* A `load_weights` follows the `release_weights` that freed its slot.
* Nothing follows a store but what comes behind it in its queue. A queue moves one thing after the other, in the order in
  which what they need has ended, so that a load finds what an earlier store of the same thing left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Literal

from flexgen_helm.schedule.operations import Operation, OperationKind
from flexgen_helm.types import Resource, Tier

MOST_SUSPENDED = 1
"""Most layer calls that are suspended while another runs: each holds its row's activations, and the CPU attends for one."""
QUEUES: dict[OperationKind, Literal["weights", "cache", "hidden"]] = {
    "load_weights": "weights",
    "load_cache": "cache",
    "store_cache": "cache",
    "load_hidden": "hidden",
    "store_hidden": "hidden",
}
"""Queue in which an operation's transfer waits for its turn."""
LOADED_OVER: dict[Tier, tuple[Resource, ...]] = {
    "device": (),
    "host": ("host_to_device",),
    "disk": ("disk_read", "host_to_device"),
}
STORED_OVER: dict[Tier, tuple[Resource, ...]] = {
    "device": (),
    "host": ("device_to_host",),
    "disk": ("device_to_host", "disk_write"),
}


def rows_at_once(*, suspends: bool) -> int:
    """Rows whose pages are brought at a time: the one that is computed, the next, and those that are suspended."""
    return 2 + MOST_SUSPENDED * suspends


def resources(kind: OperationKind, tier: Tier, *, own_memory: bool = True) -> tuple[Resource, ...]:
    """Return what is busy during an operation, one after the other.

    Args:
        kind: The operation's kind.
        tier: Where the weights, cache or hidden states that it moves are stored.
        own_memory: Whether the device has a memory of its own; without, what is on the host is in place.
    """
    if kind in ("record", "compute", "finish"):
        return ("device",)
    if kind not in QUEUES:
        return ()
    ways = STORED_OVER if kind in ("store_cache", "store_hidden") else LOADED_OVER
    return tuple(link for link in ways[tier] if own_memory or link in ("disk_read", "disk_write"))


def needs(operations: Iterable[Operation], *, suspending: Collection[int] = ()) -> Iterator[frozenset[int]]:
    """Yield, for each operation in order, the numbers of those that must have ended before it begins.

    What these need in turn is left out.

    Args:
        operations: All of a sweep, in their order.
        suspending: Rows whose calls are suspended while the CPU attends.
    """
    walk = _Walk(frozenset(suspending))
    for number, operation in enumerate(operations):
        yield walk.step(number, operation)


class _Walk:
    """The state between two operations."""

    def __init__(self, suspending: frozenset[int]) -> None:
        self._suspending = suspending
        self._settled: frozenset[int] = frozenset()
        """Work of the device that has ended before anything that follows begins."""
        self._suspended: dict[int, tuple[int, frozenset[int]]] = {}
        """Calls that may not have ended, in order: for each row its number and what it needs."""
        self._latest: dict[Operation, int] = {}
        self._released: frozenset[int] = frozenset()
        self._layer = -1

    def step(self, number: int, operation: Operation) -> frozenset[int]:
        """Take the next operation; returns what it needs."""
        kind, j, k = operation
        if kind in ("release_weights", "finish") or (kind == "compute" and j != self._layer):
            self._end(len(self._suspended))
        elif kind in ("load_cache", "load_hidden") and k in self._suspended:
            self._end([*self._suspended].index(k) + 1)
        needed = self._settled | self._own_needs(operation)
        self._latest[operation] = number
        if kind == "release_weights":
            self._released, self._layer = frozenset((number,)), -1
        elif kind == "compute" and k in self._suspending:
            self._suspended[k] = number, needed
            self._end(len(self._suspended) - MOST_SUSPENDED)
        elif kind in ("record", "compute", "finish"):
            self._settled = frozenset((number,))
        if kind == "compute":
            self._layer = j
        return needed

    def _own_needs(self, operation: Operation) -> frozenset[int]:
        """Return what an operation needs in addition to the device's work before it."""
        kind, j, k = operation
        if kind == "load_weights":
            return self._released
        if kind == "compute":
            return self._loads(Operation("load_weights", j), Operation("load_cache", j, k), Operation("load_hidden", j, k))
        if kind == "finish":
            return self._loads(Operation("load_weights", j))
        if kind in ("store_cache", "store_hidden") and k in self._suspended:
            return frozenset((self._suspended[k][0],))
        return frozenset()

    def _loads(self, *operations: Operation) -> frozenset[int]:
        return frozenset(self._latest[operation] for operation in operations if operation in self._latest)

    def _end(self, count: int) -> None:
        """Bring the first suspended calls to their end."""
        for k in [*self._suspended][: max(0, count)]:
            number, needed = self._suspended.pop(k)
            self._settled = (self._settled - needed) | {number}

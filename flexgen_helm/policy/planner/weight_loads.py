"""Loading of streamed weights on the clock, as `flexgen_helm.memory.weight_store` does it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.fluid import Fluid, Task


class WeightLoads:
    """Units in slots, and slabs that are read ahead.

    A unit that is in a slot when it is due is not loaded again, so all of them are loaded once if there are as many slots.
    Slabs on disk are read in a fixed cycle (`flexgen_helm.memory.read_ahead`): the next one as soon as a buffer is free,
    whether it has a slot or not. Where weights are used in the buffer itself, that is the slot.
    """

    def __init__(self, durations: Durations, clock: Fluid, streamed: Sequence[int]) -> None:
        """Begin with empty slots.

        Args:
            durations: Stages of the loads.
            clock: Runs them.
            streamed: The units, in the order of their use.
        """
        self._durations, self._clock = durations, clock
        weights = durations.plan.weights
        self.num_slots = min(weights.num_slots, len(streamed))
        """Units that are loaded at a time."""
        self._on_disk = [j for j in streamed if weights.tiers[j] == "disk"]
        self._num_buffers = min(self.num_slots, len(self._on_disk))
        self._in_place = not any(durations.weights(j) for j in streamed)
        self._slots: dict[int, Task] = {}
        self._released: list[int] = []
        self._reads: dict[int, Task] = {}
        self._queue: Task | None = None
        self._disk: Task | None = None

    def begin(self, j: int, after: list[Task | None]) -> Task:
        """Start to load a unit, unless it is loaded or being loaded.

        Args:
            j: The unit.
            after: Tasks that must have ended before.
        """
        if j in self._released:
            self._released.remove(j)
        if j in self._slots:
            return self._slots[j]
        if len(self._slots) == self.num_slots:
            del self._slots[self._released.pop(0)]
        self._queue = self._slots[j] = self._load(j, [*after, self._queue])
        return self._queue

    def release(self, j: int) -> None:
        """Free the slot of a unit."""
        self._released.append(j)

    def _load(self, j: int, after: list[Task | None]) -> Task:
        name, stages = f"load_weights {j}", self._durations.weights(j)
        if self._in_place:
            return self._clock.add(name, self._durations.slab(j), after)
        if j not in self._on_disk:
            return self._clock.add(name, stages, after)
        self._read_from(j, self._clock.add(name, [], after))
        # A coded slab leaves its buffer once it is decoded for the link.
        count = 1 if stages[0].resource == "unpack" else len(stages)
        taken = self._clock.add(name, stages[:count], [*after, self._reads[j]])
        self._read_from(self._behind(j, 1), taken)
        return self._clock.add(name, stages[count:], [taken])

    def _read_from(self, j: int, free: Task) -> None:
        """Read slab j and those after it, one for each buffer, unless a buffer has them."""
        wanted = [self._behind(j, i) for i in range(self._num_buffers)]
        for slab in wanted:
            if slab not in self._reads:
                if len(self._reads) == self._num_buffers:
                    del self._reads[next(held for held in self._reads if held not in wanted)]
                self._disk = self._reads[slab] = self._clock.add(
                    f"load_weights {slab}", self._durations.slab(slab), [free, self._disk]
                )

    def _behind(self, j: int, count: int) -> int:
        """Return the slab that comes so many behind slab j."""
        return self._on_disk[(self._on_disk.index(j) + count) % len(self._on_disk)]

"""Replay of sweeps on a clock: the operations of the schedule, with their dependencies, as tasks on resources. No torch.

It behaves as `flexgen_helm.execution.overlapped` does, or as `flexgen_helm.execution.serial` where the policy does not overlap:
the device does one thing after the other, three queues move one thing after the other each, the CPU attends for one row at a
time, and an operation begins when all have ended that `flexgen_helm.schedule.dependencies.needs` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from flexgen_helm.kv_cache.pages import NUM_BUFFERS
from flexgen_helm.policy.planner.durations import Durations, Stage
from flexgen_helm.policy.planner.fluid import Fluid, Mark, Task
from flexgen_helm.policy.planner.loads import SweepLoad
from flexgen_helm.policy.planner.order import Performed, Resumed, performed
from flexgen_helm.policy.planner.weight_loads import WeightLoads
from flexgen_helm.schedule.dependencies import QUEUES
from flexgen_helm.schedule.operations import Order, sweep_operations
from flexgen_helm.types import Tier


class Replay:
    """Sweeps one after the other. What is loaded ahead at the end of one is there, or on its way, in the next."""

    def __init__(self, durations: Durations, clock: Fluid, *, order: Order = "zigzag", num_layers: int | None = None) -> None:
        """Begin with nothing loaded.

        Args:
            durations: Stages of operations.
            clock: Runs them.
            order: Order in which rows go through layers.
            num_layers: Layers that are replayed, the model's first ones; None: all.
        """
        self._durations, self._clock, self._order = durations, clock, order
        plan = durations.plan
        self._policy = plan.policy
        self._num_layers = num_layers or plan.shapes.num_layers
        self._has_head = plan.shapes.has_head
        self._last_layer = plan.shapes.num_layers - 1
        self._skipped = plan.shapes.num_layers - self._num_layers
        streamed = [j for j in plan.weights.streamed if j < self._num_layers or j == plan.shapes.num_layers]
        self._streamed = frozenset(min(j, self._num_layers) for j in streamed)
        self._weights = WeightLoads(durations, clock, streamed)
        self.layer_ends: list[Mark] = []
        """The clock at the end of each layer of the last sweep."""
        self.row_ends: list[float] = []
        """When each row of the last sweep has gone through all layers."""
        self._device: Task | None = None
        self._cpu: Task | None = None
        self._last: Task | None = None
        self._queues: dict[str, Task | None] = {"cache": None, "hidden": None}
        self._overhead = 0.0
        """Time of operations that were performed since the device was last given something."""

    def sweep(self, load: SweepLoad, *, begin: float = 0.0, arrivals: Sequence[float] = ()) -> float:
        """Do a sweep.

        Args:
            load: The sweep.
            begin: When its rows are known.
            arrivals: When the hidden state of each row comes from the stage of a pipeline before this one; none: this is the
                first stage.

        Returns:
            The time at which the device has done all of it; without overlap, when stores have ended too.
        """
        overlap = self._policy.overlap
        suspends = tuple(row.on_host and overlap for row in load.rows)
        walk = _Sweep(load, self._durations.hidden_tiers(len(load.rows)), self._clock, begin=begin, arrivals=arrivals)
        last_tasks: list[Task] = []
        for step in self._steps(suspends):
            if not isinstance(step, Resumed) and step.kind in ("compute", "finish") and step.j > len(last_tasks):
                assert self._device is not None
                last_tasks.append(self._device)
            if isinstance(step, Resumed):
                attended, rest = walk.suspended.pop(step.number)
                walk.ends[step.number] = self._on_device(f"compute {step.number}", [rest], [attended])
                walk.keep(step.number)
            else:
                after = [*(walk.ends[number] for number in step.needs), walk.waits_for(step)]
                task = self._do(step, walk, after if overlap else [*after, self._last])
                walk.ends[step.number] = task
                if step.kind == "compute" and step.j == self._num_layers - 1:
                    walk.last[step.number] = step.k
                    walk.keep(step.number)
                if not overlap:  # what was loaded before is no later than what came last
                    self._last = self._clock.add("", [], [task, self._last])
        last = self._device if overlap else self._last
        assert last is not None
        if not self._has_head:
            last_tasks.append(last)
        self.layer_ends = [self._clock.mark(task) for task in last_tasks]
        end = self._clock.run_to(last)
        self.row_ends = [self._clock.run_to(task) for task in walk.through]
        return end

    def _steps(self, suspends: tuple[bool, ...]) -> tuple[Performed | Resumed, ...]:
        """Return what is performed in a sweep: operations of a model without a head where this is no last stage."""
        layers = None if self._has_head else range(self._num_layers)
        in_model = self._num_layers + (not self._has_head)
        return _performed(self._order, in_model, layers, suspends, self._streamed, self._weights.num_slots)

    def _do(self, step: Performed, walk: _Sweep, after: list[Task | None]) -> Task | None:
        """Add the tasks of an operation; returns the one that ends it."""
        kind, j, k = step.operation
        j = j if j < self._num_layers else j + self._skipped
        name = f"{kind} {j}" if k < 0 else f"{kind} {j},{k}"
        durations, row = self._durations, walk.load.rows[k] if k >= 0 else None
        if kind == "compute":
            assert row is not None
            stages = durations.layer(j, row, first=walk.layer != j)
            walk.layer = j
            if not step.suspends:
                return self._on_device(name, stages, after)
            begun = self._on_device(name, stages[:1], after)
            self._cpu = self._clock.add(name, stages[1:2], [begun, self._cpu])
            walk.suspended[step.number] = self._cpu, stages[2]
            return begun
        self._overhead += durations.profile.operation_seconds
        if kind == "record":
            assert row is not None
            return self._on_device(name, durations.record(row), after)
        if kind == "finish":
            return self._on_device(name, durations.finish(walk.load.logits), after)
        if kind == "load_weights":
            return self._weights.begin(j, after)
        if kind == "release_weights":
            self._weights.release(j)
            return self._clock.add(name, [], after)
        assert row is not None
        if kind in ("load_cache", "store_cache"):
            stores = kind == "store_cache"
            if not (row.taken if stores else row.stages):
                return None
            return self._move(QUEUES[kind], name, durations.store_cache(row) if stores else durations.load_cache(row), after)
        tier = walk.tiers[k]
        travels = (walk.arrivals and j + (kind == "store_hidden") == 0) or (kind == "store_hidden" and j == self._last_layer)
        if tier == "device" or travels:  # between stages it goes over the network
            return None
        return self._move("hidden", name, [durations.hidden(row, tier, stores=kind == "store_hidden")], after)

    def _on_device(self, name: str, stages: Sequence[Stage], after: list[Task | None]) -> Task:
        first = stages[0]._replace(seconds=stages[0].seconds + self._overhead)
        self._overhead = 0.0
        self._device = self._clock.add(name, [first, *stages[1:]], [*after, self._device])
        return self._device

    def _move(self, queue: str, name: str, pieces: list[list[Stage]], after: list[Task | None]) -> Task:
        """Add a transfer in pieces: each goes over its links one after the other, in one of a few buffers."""
        begin = self._clock.add(name, [], [*after, self._queues[queue]])
        ends: list[list[Task]] = []
        for number, piece in enumerate(pieces):
            free = ends[number - NUM_BUFFERS][-1] if number >= NUM_BUFFERS else begin
            tasks: list[Task] = []
            for i, stage in enumerate(piece):
                before = ends[-1][i] if ends and i < len(ends[-1]) else None
                tasks.append(self._clock.add(name, [stage], [tasks[-1] if tasks else free, before]))
            if tasks:
                ends.append(tasks)
        end = self._clock.add(name, [], [task for tasks in ends for task in tasks[-1:]] or [begin])
        self._queues[queue] = end
        return end


@lru_cache(maxsize=8)
def _performed(
    order: Order,
    num_layers: int,
    layers: range | None,
    suspends: tuple[bool, ...],
    streamed: frozenset[int],
    num_slots: int,
) -> tuple[Performed | Resumed, ...]:
    """Return the steps of a sweep, of which each row's calls are suspended or not.

    They are kept, since many sweeps that are replayed in turn have equally many rows.
    """
    operations = sweep_operations(order, num_layers, len(suspends), layers=layers, streamed=streamed, num_slots=num_slots)
    return tuple(performed(operations, frozenset(k for k, each in enumerate(suspends) if each)))


class _Sweep:
    """What is known of the sweep that is being added."""

    def __init__(self, load: SweepLoad, tiers: list[Tier], clock: Fluid, *, begin: float, arrivals: Sequence[float]) -> None:
        self.load, self.tiers, self.arrivals = load, tiers, arrivals
        self._begin, self._arrived = clock.at(begin), [clock.at(seconds) for seconds in arrivals]
        self.layer = -1
        """Layer that was computed last."""
        self.ends: dict[int, Task | None] = {}
        """What ends each operation; None: it needs no time."""
        self.suspended: dict[int, tuple[Task, Stage]] = {}
        """Attention of suspended calls, and what the device does behind it."""
        self.last: dict[int, int] = {}
        """Rows of the calls of the last layer, by the number of the operation."""
        self._through: dict[int, Task] = {}

    @property
    def through(self) -> list[Task]:
        """What ends the last layer on each row."""
        return [self._through[k] for k in range(len(self.load.rows))]

    def waits_for(self, step: Performed) -> Task | None:
        """Return what comes from outside before an operation: the plan of the sweep, or a row from the stage before."""
        if step.kind == "record":
            return self._begin
        return self._arrived[step.k] if step.kind == "compute" and step.j == 0 and self._arrived else None

    def keep(self, number: int) -> None:
        """Note what ends a call of the last layer."""
        task = self.ends[number]
        if number in self.last and task is not None:
            self._through[self.last[number]] = task

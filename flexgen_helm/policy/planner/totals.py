"""Totals of a sweep: how long each resource works and what it moves, whatever waits for what. No torch.

The busiest resource is a bound from below: the model of FlexGen section 4.3, in which everything overlaps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from flexgen_helm.policy.planner.durations import Durations, Stage
from flexgen_helm.policy.planner.fluid import Mark
from flexgen_helm.policy.planner.loads import SweepLoad
from flexgen_helm.schedule.operations import sweep_operations


class Totals:
    """Totals of sweeps in column order, once weights were loaded for the first time."""

    def __init__(self, durations: Durations) -> None:
        """Group the layers that take equally long.

        Args:
            durations: Stages of operations.
        """
        self._durations, plan = durations, durations.plan
        shapes, weights = plan.shapes, plan.weights
        kinds: dict[object, list[int]] = defaultdict(list)
        for j in range(shapes.num_layers):
            kinds[shapes.products_of(j), shapes.bound_bytes[j], j in weights.streamed].append(j)
        self._kinds = [(layers[0], len(layers)) for layers in kinds.values()]
        self._streamed = frozenset(weights.streamed)
        loaded = weights.streamed if weights.num_slots < len(weights.streamed) else []
        self._weights = [stage for j in loaded for stage in (*durations.slab(j), *durations.weights(j))]
        self._num_operations: dict[int, int] = {}

    def of(self, load: SweepLoad) -> Mark:
        """Return the time of the busiest resource in a sweep, and the totals of all."""
        seconds: dict[str, float] = defaultdict(float)
        moved: dict[str, float] = defaultdict(float)

        def add(stages: Iterable[Stage], times: float = 1.0) -> None:
            for stage in stages:
                seconds[stage.resource] += times * stage.seconds
                moved[stage.resource] += times * stage.num_bytes

        durations, num_rows = self._durations, len(load.rows)
        num_layers, tiers = durations.plan.shapes.num_layers, durations.hidden_tiers(num_rows)
        add(self._weights)
        for k, (row, tier) in enumerate(zip(load.rows, tiers, strict=True)):
            add(durations.record(row))
            for j, count in self._kinds:
                add(durations.layer(j, row, first=k == 0), count)
            for piece in (*durations.load_cache(row), *durations.store_cache(row)):
                add(piece, num_layers)
            if tier != "device" and num_rows > 1:
                for stores in (True, False):
                    add(durations.hidden(row, tier, stores=stores), num_layers)
        add(durations.finish(load.logits))
        seconds["device"] += self._operations(num_rows) * durations.profile.operation_seconds
        return Mark(max(seconds.values()), moved, seconds)

    def waits(self, load: SweepLoad) -> bool:
        """Return whether anything but the device works in a sweep, so that something may have to wait."""
        moves = any(tier != "device" for tier in self._durations.hidden_tiers(len(load.rows)))
        return bool(self._streamed) or moves or any(row.stages or row.on_host for row in load.rows)

    def _operations(self, num_rows: int) -> int:
        """Return the number of operations other than layer calls."""
        if num_rows not in self._num_operations:
            num_layers, slots = self._durations.plan.shapes.num_layers, self._durations.plan.weights.num_slots
            operations = sweep_operations("zigzag", num_layers, num_rows, streamed=self._streamed, num_slots=slots)
            self._num_operations[num_rows] = sum(operation.kind != "compute" for operation in operations)
        return self._num_operations[num_rows]

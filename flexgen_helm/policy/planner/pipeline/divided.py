"""A model that is divided over the stages of a pipeline: layers, memory and capacity of each. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from flexgen_helm.errors import PolicyError
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.capacity import Capacity
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.sweeps import plan_capacity
from flexgen_helm.policy.space import Space
from flexgen_helm.policy.stages.balance import balanced, stage_costs
from flexgen_helm.types import TIERS, ResolvedPolicy


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline, on equal machines under one policy.

    Attributes:
        shapes: Sizes of the whole model.
        profile: The machine of each stage.
        ranges: Layers of each stage.
        plans: Memory plan of each stage, whose layers count from 0.
        lanes: Independent sweeps that are in flight. Each has a block of its own, and its part of the cache.
    """

    shapes: ModelShapes
    profile: MachineProfile
    ranges: tuple[range, ...]
    plans: tuple[MemoryPlan, ...]
    lanes: int

    @classmethod
    def of(
        cls,
        shapes: ModelShapes,
        policy: ResolvedPolicy,
        machine: tuple[MachineProfile, Space],
        ranges: Iterable[range],
        *,
        lanes: int,
    ) -> Stages:
        """Plan the memory of every stage.

        Args:
            shapes: Sizes of the whole model.
            policy: Policy of all stages.
            machine: Profile of each stage's machine, and the bytes that may be used there.
            ranges: Layers of each stage.
            lanes: Sweeps that are in flight.

        Raises:
            PolicyError: If a stage does not fit.
        """
        profile, space = machine
        ranges = tuple(ranges)
        policy = replace(policy, num_lanes=lanes if len(ranges) > 1 else None)
        plans = []
        for s, layers in enumerate(ranges):
            try:
                plans.append(MemoryPlan.of(shapes.of_layers(layers), policy, space))
            except PolicyError as error:
                which = f"Stage {s} of {len(ranges)} (layers {layers.start} to {layers.stop - 1}): "
                raise PolicyError(f"{which}{error}" if len(ranges) > 1 else str(error)) from None
        return cls(shapes, profile, ranges, tuple(plans), lanes)

    @property
    def capacity(self) -> Capacity:
        """What the sweeps of a lane may hold, in bytes of the first stage: pages that every stage has room for."""
        found = [(plan_capacity(plan), plan.shapes.num_layers) for plan in self.plans]
        layers = found[0][1]
        per_layer = {tier: min(each.cache_bytes[tier] / count for each, count in found) for tier in TIERS}
        cache = {tier: int(layers * count / self.lanes) for tier, count in per_layer.items()}
        return Capacity(cache, min(each.block_tokens for each, _ in found))

    @cached_property
    def durations(self) -> list[Durations]:
        """Durations of the operations of each stage."""
        return [Durations(plan, self.profile, whole=self.shapes) for plan in self.plans]


def even_ranges(shapes: ModelShapes, count: int) -> tuple[range, ...]:
    """Divide a model as the stages of a running pipeline do whose machines were not measured: by products and bytes.

    Args:
        shapes: Sizes of the model.
        count: Number of stages.

    Raises:
        PolicyError: If there are fewer layers than stages.
    """
    layers, head = stage_costs(shapes)
    return balanced(layers, count, last=head)

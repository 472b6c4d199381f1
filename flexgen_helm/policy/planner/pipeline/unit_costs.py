"""What each layer and the output head of a model cost on a machine, by its profile. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.cache_plan import CachePlan
from flexgen_helm.policy.capacity import Capacity
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.loads import RowLoad, SweepLoad
from flexgen_helm.policy.planner.pipeline.divided import even_ranges
from flexgen_helm.policy.planner.sweeps import sweep_loads
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.policy.stages.balance import balanced_over
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.types import ON_DEVICE, TIERS, ResolvedPolicy

PROMPT_LEN, GEN_LEN = 512, 32
"""Tokens of the prompt and of the answer of a typical job, as in FlexGen's evaluation: with them units are weighed."""


@dataclass(frozen=True)
class UnitSeconds:
    """Seconds that units take for a block of typical jobs.

    Attributes:
        layers: Of each layer.
        head: Of the output head, with the choice of tokens.
    """

    layers: tuple[float, ...]
    head: float


def unit_seconds(shapes: ModelShapes, part: MemoryPlan, profile: MachineProfile) -> UnitSeconds:
    """Predict what units take.

    A layer takes as long as it is computed, or as long as weights that a stage brings in every sweep take for each of its
    layers, if that is longer: both happen at once.

    Args:
        shapes: Sizes of the whole model.
        part: Plan of about the layers that the machine would get.
        profile: The machine.

    Raises:
        PolicyError: If the profile lacks a rate that the policy needs.
        OutOfSpace: If a typical job does not fit into the cache.
    """
    policy = replace(part.policy, weights=ON_DEVICE)
    resident = _resident(shapes, policy, part.space)
    loads = _typical_loads(resident)
    durations = Durations(resident, profile)
    bringing = _bringing_seconds(Durations(part, profile, whole=shapes)) * sum(load.count for load in loads)
    least = bringing / part.shapes.num_layers
    layers = (
        sum(load.count * sum(_device_seconds(durations, j, row) for row in load.rows) for load in loads)
        for j in range(shapes.num_layers)
    )
    head = sum(load.count * sum(stage.seconds for stage in durations.finish(load.logits)) for load in loads)
    return UnitSeconds(tuple(max(each, least) for each in layers), head)


def divided(costs: Sequence[UnitSeconds]) -> tuple[range, ...]:
    """Divide layers over stages on whose machines units take so long.

    Raises:
        PolicyError: If there are fewer layers than stages.
    """
    return balanced_over([each.layers for each in costs], [*[0.0] * (len(costs) - 1), costs[-1].head])


def measured_ranges(
    shapes: ModelShapes, policy: ResolvedPolicy, machine: tuple[MachineProfile, Space], count: int
) -> tuple[range, ...]:
    """Divide a model as the stages of a running pipeline do whose machines were measured.

    Args:
        shapes: Sizes of the whole model.
        policy: Policy of all stages.
        machine: Profile of each stage's machine, and the bytes that may be used there.
        count: Number of stages.

    Raises:
        PolicyError: If there are fewer layers than stages, or a stage does not fit.
    """
    profile, space = machine
    parts = [MemoryPlan.of(shapes.of_layers(layers), policy, space) for layers in even_ranges(shapes, count)]
    return divided([unit_seconds(shapes, part, profile) for part in parts])


def _resident(shapes: ModelShapes, policy: ResolvedPolicy, space: Space) -> MemoryPlan:
    """Return a plan with all weights on the device, whether or not they fit."""
    own_memory = space.own_memory
    weights = WeightPlan.by_shares(shapes, ON_DEVICE, own_memory=own_memory, prefetch=policy.prefetch)
    return MemoryPlan(shapes, policy, space, weights, CachePlan.of(shapes, policy, own_memory=own_memory))


def _typical_loads(plan: MemoryPlan) -> list[SweepLoad]:
    """Return the sweeps of a block of typical jobs whose K and V all fit."""
    jobs = plan.policy.block_size
    room = 2 * jobs * plan.cache.sequence_bytes(PROMPT_LEN + GEN_LEN)
    tokens = plan.policy.block_tokens or plan.policy.num_gpu_batches * plan.policy.gpu_batch_tokens
    return list(
        sweep_loads(plan, Workload.uniform(jobs, PROMPT_LEN, GEN_LEN), capacity=Capacity(dict.fromkeys(TIERS, room), tokens))
    )


def _device_seconds(durations: Durations, j: int, row: RowLoad) -> float:
    """Return how long a row occupies a layer: where the CPU attends beside the device, both work on different rows."""
    stages = durations.layer(j, row)
    on_device = sum(stage.seconds for stage in stages if stage.resource == "device")
    return max(on_device, sum(stage.seconds for stage in stages) - on_device)


def _bringing_seconds(durations: Durations) -> float:
    """Return how long the weights that are not on the device take in a sweep, on the link or processor that takes longest."""
    found: dict[str, float] = {}
    for j in durations.plan.weights.streamed:
        for stage in (*durations.slab(j), *durations.weights(j)):
            found[stage.resource] = found.get(stage.resource, 0.0) + stage.seconds
    return max(found.values(), default=0.0)

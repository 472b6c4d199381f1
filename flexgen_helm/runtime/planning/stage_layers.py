"""Which layers each stage of a pipeline computes: as many as take equally long on every machine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from flexgen_helm.errors import OutOfSpace, PolicyError
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.pipeline.unit_costs import GEN_LEN, PROMPT_LEN, UnitSeconds, divided, unit_seconds
from flexgen_helm.policy.space import Space
from flexgen_helm.policy.stages.balance import stage_costs
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.runtime.planning.machine_profile import Subject, kept_profile
from flexgen_helm.types import ResolvedPolicy

logger = logging.getLogger(__name__)


def stage_layers(
    source: ModelSource, shapes: ModelShapes, policy: ResolvedPolicy, space: Space, options: EngineOptions
) -> range | None:
    """Return the layers of this stage of a pipeline; None: there are no stages.

    Seconds are predicted from the profile of each stage's machine: the one that the user names, or the one that was measured
    there before. If a stage has none, layers count by their products and bytes on all stages.

    Args:
        source: The model.
        shapes: Its sizes.
        policy: Policy of all stages.
        space: Bytes of each tier that this stage may use.
        options: Options of the user.

    Raises:
        PolicyError: If there are fewer layers than stages.
    """
    if options.stage is None:
        return None
    group = options.stage.group
    products = UnitSeconds(*stage_costs(shapes))
    by_products = divided([products] * group.count)
    profile = _profile(source, policy, options)
    own: UnitSeconds | None = None
    if profile is not None:
        with suppress(PolicyError, OutOfSpace):  # what does not fit is told by the plan of the stage
            own = unit_seconds(shapes, MemoryPlan.of(shapes.of_layers(by_products[group.index]), policy, space), profile)
    found = group.exchange("unit seconds", (own, None if profile is None else profile.name))
    seconds = [each for each, _ in found if each is not None]
    measured = len(seconds) == group.count
    ranges = divided(seconds) if measured else by_products
    if group.is_first:
        _say(ranges, seconds if measured else [products] * group.count, [name for _, name in found if measured])
    return ranges[group.index]


def _profile(source: ModelSource, policy: ResolvedPolicy, options: EngineOptions) -> MachineProfile | None:
    """Return the profile of this stage's machine; None: there is none."""
    profile = options.profile
    if profile is None:
        profile = kept_profile(options.device, Subject(source, policy, options.compile_layers), folder=options.folder)
    return None if profile is None else profile.with_layers(compiled=options.compile_layers)


def _say(ranges: Sequence[range], costs: Sequence[UnitSeconds], machines: Sequence[str | None]) -> None:
    """Log the layers of all stages and what they cost."""
    loads = [sum(each.layers[j] for j in layers) for layers, each in zip(ranges, costs, strict=True)]
    loads[-1] += costs[-1].head
    parts = [f"{layers.start} to {layers.stop - 1}" for layers in ranges]
    if machines:
        texts = [f"{part} ({load:.2f} s, {machine})" for part, load, machine in zip(parts, loads, machines, strict=True)]
        jobs = f"a block of jobs of {PROMPT_LEN} and {GEN_LEN} tokens"
        logger.info("layers of the stages, with the seconds predicted for %s: %s", jobs, "; ".join(texts))
        return
    texts = [f"{part} ({load / sum(loads):.0%})" for part, load in zip(parts, loads, strict=True)]
    reason = "`flexgen-helm profile --model` on every machine lets seconds count"
    logger.info("layers of the stages, with their shares of products or bytes: %s. %s.", "; ".join(texts), reason)

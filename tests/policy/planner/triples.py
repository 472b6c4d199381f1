"""Random machines, models and workloads, small enough that the simulator takes milliseconds."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

from flexgen_helm.machine.profile import AttentionRate, MachineProfile, ProductRate, Rate
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.types import ON_DEVICE, TIERS, Policy, ResolvedPolicy, Tier
from tests.policy.planner.made import FORMATS, cpu, model, space_of, t4


class Triple(NamedTuple):
    """What a policy is chosen for, and the row sizes."""

    shapes: ModelShapes
    workload: Workload
    profile: MachineProfile
    space: Space
    asked: Policy


def random_triple(seed: int) -> Triple:
    """Draw a triple; memory is drawn as a part of what model and cache take, and rates over an order of magnitude."""
    draw = random.Random(seed)
    layers = draw.choice((4, 6, 9))
    shapes = model(layers, 512, 8, kv_heads=draw.choice((2, 8)), vocab=2000, itemsize=draw.choice((2, 4)))
    own_memory = draw.random() < 0.6
    profile = _slower(t4() if own_memory else cpu(), draw)
    asked = Policy(gpu_batch_size=8, gpu_batch_tokens=64)
    memory = _memory(shapes, profile, draw)
    profile = replace(profile, memory=memory)
    return Triple(shapes, _workload(draw), profile, space_of(profile), asked)


def _memory(shapes: ModelShapes, profile: MachineProfile, draw: random.Random) -> dict[Tier, int]:
    """Draw memory between what a model takes that is on disk, and a little more than what one takes that is resident."""
    sizes = ResolvedPolicy(gpu_batch_size=8, gpu_batch_tokens=64, cpu_attention=0.0)
    space = Space(dict.fromkeys(TIERS, 2**40), profile.own_memory)
    least, most = (
        MemoryPlan.of(shapes, replace(sizes, weights=shares), space).peak_bytes for shares in ((0.0, 0.0, 1.0), ON_DEVICE)
    )
    host = least["host"] + int(draw.choice((0.2, 0.6, 1.2)) * max(shapes.total_bytes, most["host"] - least["host"]))
    if not profile.own_memory:
        return {"device": host, "host": host, "disk": 2**36}
    device = least["device"] + int(draw.choice((0.1, 0.5, 1.2)) * (most["device"] - least["device"]))
    return {"device": device, "host": host, "disk": 2**36}


def _workload(draw: random.Random) -> Workload:
    shared = (0,) * draw.choice((0, 40))
    scores = draw.random() < 0.3
    prompts = []
    for i in range(draw.choice((8, 16))):
        own = tuple(1000 * (i + 1) + j for j in range(draw.randint(20, 90)))
        prompts.append(PlannedPrompt((*shared, *own), () if scores else (draw.choice((3, 6)),), scores))
    return Workload(tuple(prompts))


def _slower(profile: MachineProfile, draw: random.Random) -> MachineProfile:
    """Return a profile with rates as slow as a small model needs them to matter."""

    def some(low: float) -> Rate:
        return Rate(low * 10 ** draw.random())

    speed = 10 ** draw.random()
    products = tuple(
        ProductRate(dtype, n, Rate(rate * speed)) for dtype in FORMATS for n, rate in ((1, 2e9), (8, 15e9), (64, 60e9))
    )
    attention = tuple(
        AttentionRate(place, kind, form, some(2e9))
        for form in FORMATS
        for place in ("device", "host")
        for kind in ("prefill", "decode")
    )
    own = profile.own_memory
    return replace(
        profile,
        is_gpu=False,
        device_read=Rate(20e9),
        host_read=Rate(10e9),
        host_to_device=some(1e9) if own else None,
        device_to_host=some(1e9) if own else None,
        disk_read=some(0.2e9),
        disk_write=some(0.2e9),
        products=products,
        attention=attention,
        call_seconds={"prefill": 1e-4, "decode": 1e-4},
        operation_seconds=1e-5,
    )

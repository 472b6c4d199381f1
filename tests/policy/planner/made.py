"""Made-up models and machines, in plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_helm.machine.profile import AttentionRate, MachineProfile, ProductRate, Rate, UnpackRate
from flexgen_helm.policy.cache_plan import CachePlan
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.policy.space import Space
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.types import TIERS, ResolvedPolicy, Tier

KIB = 1024
MIB = 2**20


def shapes_with(num_layers: int = 4, *, layer: int = 64 * KIB, head: int | None = None, **fields: Any) -> ModelShapes:
    """Returns a model of 16-bit weights whose layers have so many bytes; ``head``: of an output head of its own."""
    units = dict.fromkeys(range(num_layers), layer) | ({} if head is None else {num_layers: head})
    sizes: dict[str, Any] = {
        "num_layers": num_layers,
        "stored_bytes": {EMBEDDINGS: 8 * KIB, **units},
        "carried_bytes": units,
        "bound_bytes": units,
        "disk_bytes": units,
        "is_coded": False,
        "is_packed": False,
        "vocab_size": 128,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "outputs_per_token": 300,
        "itemsize": 2,
        "kv_itemsize": 2,
        "first_layers_bytes": layer,
    }
    return ModelShapes(**sizes | fields)


def policy_with(**fields: Any) -> ResolvedPolicy:
    """Returns a policy with small rows."""
    return ResolvedPolicy(**{"gpu_batch_size": 16, "num_gpu_batches": 2, "gpu_batch_tokens": 32, "block_tokens": 96} | fields)


def plan_with(
    shapes: ModelShapes,
    policy: ResolvedPolicy,
    tiers: Mapping[int, Tier] | None = None,
    *,
    own_memory: bool = True,
    available: int = 2**30,
) -> MemoryPlan:
    """Returns the plan with a tier for each unit; those that are not named are on the device."""
    space = Space(dict.fromkeys(TIERS, available), own_memory)
    placed: dict[int, Tier] = {**dict.fromkeys(shapes.stored_bytes, "device"), **(tiers or {})}
    weights = WeightPlan(shapes, placed, own_memory, policy.prefetch)
    return MemoryPlan(shapes, policy, space, weights, CachePlan.of(shapes, policy, own_memory=own_memory))


def machine_with(**fields: Any) -> MachineProfile:
    """Returns a slow machine, so that tiny models take a while."""
    given: dict[str, Any] = {
        "name": "made up",
        "date": "2026-11-29",
        "source": "made up",
        "device": "none",
        "own_memory": True,
        "is_gpu": False,
        "threads": 2,
        "memory": dict.fromkeys(TIERS, 2**30),
        "device_read": Rate(1e9),
        "host_read": Rate(1e9),
        "host_to_device": Rate(1e7),
        "device_to_host": Rate(1e7),
        "disk_read": Rate(4e6),
        "disk_write": Rate(3e6),
        "products": (ProductRate("bfloat16", 16, Rate(1e8)), ProductRate("bfloat16", 64, Rate(2e8))),
        "attention": (
            AttentionRate("device", "prefill", "bfloat16", Rate(1e8)),
            AttentionRate("device", "decode", "bfloat16", Rate(1e8)),
            AttentionRate("host", "decode", "bfloat16", Rate(2e7)),
        ),
        "unpack": (UnpackRate("device", "w4", Rate(3e7)), UnpackRate("host", "w4", Rate(2e7))),
    }
    return MachineProfile(**given | fields)

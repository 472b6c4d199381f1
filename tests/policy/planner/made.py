"""Machines, models and plans for tests of the planner, in plain data."""

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
GIB = 2**30
FORMATS = ("float16", "bfloat16", "float32")


def shapes_with(
    num_layers: int = 4, *, layer: int = 64 * KIB, head: int | None = None, embeddings: int = 8 * KIB, **fields: Any
) -> ModelShapes:
    """Returns a model of 16-bit weights whose units have so many bytes; ``head``: of an output head of its own."""
    units = dict.fromkeys(range(num_layers), layer) | ({} if head is None else {num_layers: head})
    sizes: dict[str, Any] = {
        "num_layers": num_layers,
        "stored_bytes": {EMBEDDINGS: embeddings, **units},
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


def model(
    layers: int, hidden: int, heads: int, *, kv_heads: int | None = None, vocab: int = 50272, itemsize: int = 2
) -> ModelShapes:
    """Returns a decoder with an inner size of four times the hidden size, and tied embeddings, as OPT has."""
    kv = kv_heads or heads
    head_dim = hidden // heads
    layer = (hidden * (2 * hidden + 2 * kv * head_dim) + 8 * hidden * hidden) * itemsize
    dtype = "float16" if itemsize == 2 else "float32"
    return shapes_with(
        layers,
        layer=layer,
        embeddings=vocab * hidden * itemsize,
        vocab_size=vocab,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        outputs_per_token=7 * hidden + 2 * kv * head_dim,
        itemsize=itemsize,
        kv_itemsize=itemsize,
        first_layers_bytes=layer + 2 * 512 * hidden * itemsize,
        dtype=dtype,
        kv_format=dtype,
    )


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
        "source": "tests",
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


def t4(device: float = 15, host: float = 200, disk: float = 1500) -> MachineProfile:
    """Returns the paper's machine: 12 GB/s to the GPU, 2 and 1 GB/s from and to the disk."""
    return machine_with(
        name="t4",
        device="NVIDIA T4",
        is_gpu=True,
        threads=16,
        memory={"device": int(device * GIB), "host": int(host * GIB), "disk": int(disk * GIB)},
        device_read=Rate(250e9),
        host_read=Rate(60e9),
        host_to_device=Rate(12e9),
        device_to_host=Rate(12e9),
        duplex=0.8,
        disk_read=Rate(2e9),
        disk_write=Rate(1e9),
        products=_products(0.25e12, 12e12, 25e12),
        attention=(
            *(AttentionRate("device", "prefill", form, Rate(5e12)) for form in FORMATS),
            *(AttentionRate("device", "decode", form, Rate(150e9)) for form in FORMATS),
            *(AttentionRate("host", "decode", form, Rate(20e9)) for form in FORMATS),
        ),
        unpack=(
            UnpackRate("device", "w4", Rate(60e9)),
            UnpackRate("host", "w4", Rate(5e9)),
            UnpackRate("host", "lossless", Rate(5e9)),
        ),
        call_seconds={"prefill": 5e-4, "decode": 3e-4},
        operation_seconds=2e-5,
    )


def cpu(ram: float = 16, disk: float = 200) -> MachineProfile:
    """Returns a small CPU: device and host are one memory."""
    return machine_with(
        name="cpu",
        device="CPU",
        own_memory=False,
        memory={"device": int(ram * GIB), "host": int(ram * GIB), "disk": int(disk * GIB)},
        device_read=Rate(12e9),
        host_read=Rate(12e9),
        host_to_device=None,
        device_to_host=None,
        disk_read=Rate(2e9),
        disk_write=Rate(1e9),
        products=_products(10e9, 80e9, 120e9),
        attention=(
            *(AttentionRate("device", "prefill", form, Rate(40e9)) for form in FORMATS),
            *(AttentionRate("device", "decode", form, Rate(5e9)) for form in FORMATS),
        ),
        unpack=(UnpackRate("device", "w4", Rate(2e9)), UnpackRate("device", "lossless", Rate(2e9))),
        call_seconds={"prefill": 5e-4, "decode": 3e-4},
        operation_seconds=2e-5,
    )


def _products(*rates: float) -> tuple[ProductRate, ...]:
    """Rates of products by 1, 64 and 512 tokens, in each dtype."""
    return tuple(ProductRate(dtype, n, Rate(rate)) for dtype in FORMATS for n, rate in zip((1, 64, 512), rates, strict=True))


def space_of(profile: MachineProfile) -> Space:
    """Returns all the memory of a machine."""
    return Space(profile.memory, profile.own_memory, is_gpu=profile.is_gpu)

"""Place of attention: whether decode rows attend on the device, or on the CPU to K and V that are on the host.

A GPU and a CPU round differently. So the place is numerics on a GPU, and one value for all sequences of an engine: with a
share, an answer would depend on the row that a sequence gets, or on the tier that has room for its pages. The policy's
`cpu_attention` names the place; else model, machine, limits and row sizes decide it. What is free at the moment does not, nor
do other fields of the policy, nor dtype and compression: sizes are those of 16 bits for each element.

On a CPU that plays a device with a memory of its own, bits are the same everywhere, and every share is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_helm.errors import PolicyError
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.space import Space
from flexgen_helm.types import ON_DEVICE, ON_HOST, Policy, ResolvedPolicy, Shares

ROUNDING = "A GPU and a CPU round differently, so on a GPU an answer must not depend on where its K and V are."


@dataclass(frozen=True)
class AttentionPlace:
    """Where decode rows attend, and where K and V are stored for it."""

    cpu_attention: float
    """Share of the decode rows whose attention to the host's part of the cache is computed on the CPU; on a GPU 0 or 1."""
    cache: Shares
    """Shares of the K/V cache."""
    reason: str | None = None
    """Reason of a choice that is worth a line in the log; None: there is none."""


def attention_place(asked: Policy, sizes: ResolvedPolicy, shapes: ModelShapes, machine: Space) -> AttentionPlace:
    """Decide the place of attention for a device with a memory of its own.

    Args:
        asked: Policy of the user.
        sizes: Policy with the row sizes.
        shapes: Sizes of the model.
        machine: Bytes of each tier that the machine has and the user allows, whether they are free or not.

    Raises:
        PolicyError: If the policy makes the place on a GPU depend on a row or on a page's tier.
    """
    given, cache = asked.cpu_attention, asked.cache
    if machine.is_gpu and given is not None and 0 < given < 1:
        raise PolicyError(
            f"cpu_attention is {given}, but on a GPU it is 0 or 1. A GPU and a CPU round differently, so an answer would "
            "depend on the row in which it is computed. Give 0 or 1, or leave it out."
        )
    if given is not None:
        place = AttentionPlace(given, cache or (ON_HOST if given == 1 else ON_DEVICE))
    elif cache is not None and not machine.is_gpu:
        place = AttentionPlace(ResolvedPolicy.cpu_attention, cache)
    else:
        place = _chosen(sizes, shapes, machine)
        place = AttentionPlace(place.cpu_attention, cache or place.cache, place.reason)
    if machine.is_gpu and place.cpu_attention and place.cache[1] < 1:
        _refuse_mixture(asked, place)
    return place


def _refuse_mixture(asked: Policy, place: AttentionPlace) -> None:
    """Refuse a cache that is not wholly on the host, unless the user asked for attention on the CPU and none of it is there."""
    if asked.cpu_attention is None:
        raise PolicyError(
            f"cache={place.cache} keeps K and V off the host, but attention is on the CPU: {place.reason}. {ROUNDING} Leave "
            "`cache` out, or set cpu_attention to 0 to attend on the GPU; answers then differ in the last digits."
        )
    if place.cache[1]:
        raise PolicyError(
            f"cache={place.cache} with cpu_attention={place.cpu_attention:g} lets the CPU attend to a part of K and V. "
            f"{ROUNDING} Set cache to (0, 1, 0), or cpu_attention to 0."
        )


def _chosen(sizes: ResolvedPolicy, shapes: ModelShapes, machine: Space) -> AttentionPlace:
    """Choose the CPU where weights are streamed, the block's K and V do not fit on the device, and more fit on the host."""
    on_device, on_host = (_planned(cache, sizes, shapes, machine) for cache in (ON_DEVICE, ON_HOST))
    if on_host is None or (on_device is not None and on_device.weights.is_resident):
        return AttentionPlace(0.0, ON_DEVICE)
    block_size = on_host.policy.block_size
    wanted, host_room = on_host.cache.full_bytes(block_size), _cache_room(on_host)
    device_room = 0 if on_device is None else _cache_room(on_device)
    block = f"weights are streamed, and K and V of {block_size:,} sequences"
    if device_room >= wanted:
        return AttentionPlace(0.0, ON_DEVICE, f"{block} fit on the device")
    if device_room >= host_room:
        return AttentionPlace(0.0, ON_DEVICE, f"{block} fit on no tier, and on the host fewer than on the device")
    return AttentionPlace(1.0, ON_HOST, f"{block} do not fit on the device")


def _planned(cache: Shares, sizes: ResolvedPolicy, shapes: ModelShapes, machine: Space) -> MemoryPlan | None:
    """Return the plan of an engine that stores 16 bits for each element and follows the defaults; None if it does not fit."""
    policy = ResolvedPolicy(
        gpu_batch_size=sizes.gpu_batch_size,
        gpu_batch_tokens=sizes.gpu_batch_tokens,
        cache=cache,
        cpu_attention=float(cache == ON_HOST),
    )
    try:
        return MemoryPlan.of(shapes.at_16_bits(), policy, machine)
    except PolicyError:
        return None


def _cache_room(plan: MemoryPlan) -> int:
    return sum(plan.cache.capacities(plan.left(plan.space.available)).values())

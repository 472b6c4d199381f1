"""Refusal: why no policy is found, and the smallest change with which one would be. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from flexgen_helm.errors import PolicyError
from flexgen_helm.memory.amounts import gib
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.choice import Constraints
from flexgen_helm.policy.planner.search.memory_rows import only
from flexgen_helm.policy.space import Space, pool_name
from flexgen_helm.types import ON_DEVICE, TIERS, ResolvedPolicy, Shares, Tier

PRECISION = 2**20
"""Bytes to which the missing memory is found."""


def refuse(
    shapes: ModelShapes, base: ResolvedPolicy, space: Space, constraints: Constraints, known: Sequence[Prediction]
) -> PolicyError:
    """Return the error for a search that found nothing.

    Args:
        shapes: Sizes of the model.
        base: The default policy.
        space: Bytes of each tier that may be used.
        constraints: Demands of the user.
        known: Predictions of plans that fit, none of which keeps the constraints.
    """
    if known:
        return PolicyError(" ".join(_unmet(constraints, known)))
    missing = {tier: count for tier in TIERS if (count := missing_bytes(shapes, base, space, constraints, tier)) is not None}
    allowed = ", ".join(tier for tier in TIERS if tier in constraints.tiers)
    ways = " or ".join(
        f"{gib(count, up=True)} more {pool_name(tier, own_memory=space.own_memory)}"
        for tier, count in missing.items()
        if space.own_memory or tier != "device"
    )
    change = f"It would fit with {ways}." if ways else "No amount on one tier alone would be enough."
    off = "" if len(constraints.tiers) == len(TIERS) else f" with weights, K and V on {allowed} only"
    return PolicyError(
        f"The model does not fit{off}: memory is what cannot be met. {change} Allow more memory (max_memory) or another tier, "
        "lower gpu_batch_size or gpu_batch_tokens, or compress the weights (such as @w4)."
    )


def missing_bytes(shapes: ModelShapes, base: ResolvedPolicy, space: Space, constraints: Constraints, tier: Tier) -> int | None:
    """Return how many bytes more of a tier would let some plan fit, to within `PRECISION`; None: no number does.

    Args:
        shapes: Sizes of the model.
        base: The default policy.
        space: Bytes of each tier that may be used.
        constraints: Demands of the user.
        tier: The tier that grows.
    """

    def fits(more: int) -> bool:
        available = {**space.available, tier: space.available[tier] + more}
        if not space.own_memory and tier == "host":
            available["device"] = available["host"]
        larger = replace(space, available=available)
        return any(_fits(shapes, policy, larger) for policy in _smallest(base, constraints, own_memory=space.own_memory))

    high = PRECISION
    most = 8 * (shapes.total_bytes + shapes.loading_bytes) + 2**36
    while not fits(high):
        high *= 2
        if high > most:
            return None
    low = 0
    while high - low > PRECISION:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _smallest(base: ResolvedPolicy, constraints: Constraints, *, own_memory: bool) -> Iterator[ResolvedPolicy]:
    """Yield the policies that take least on one tier: the smallest block, and all weights on one tier."""
    least = replace(base, num_gpu_batches=1, block_tokens=base.gpu_batch_tokens, prefetch=1)
    caches: list[Shares] = [only(tier) for tier in TIERS if tier in constraints.tiers]
    if (own_memory and base.cpu_attention) or "device" not in constraints.tiers:
        caches = [base.cache, *caches]
    for tier in (tier for tier in TIERS if tier in constraints.tiers and (own_memory or tier != "host")):
        for cache in caches if own_memory else [ON_DEVICE]:
            yield replace(least, weights=only(tier), cache=cache)
    if base.weights is not None:
        yield base


def _fits(shapes: ModelShapes, policy: ResolvedPolicy, space: Space) -> bool:
    try:
        MemoryPlan.of(shapes, policy, space)
    except PolicyError:
        return False
    return True


def _unmet(constraints: Constraints, known: Sequence[Prediction]) -> Iterator[str]:
    fastest = min(known, key=lambda each: each.latency_seconds)
    best = max(known, key=lambda each: each.tokens_per_second)
    latency, throughput = constraints.max_latency, constraints.min_throughput
    alone = [
        latency is None or fastest.latency_seconds <= latency,
        throughput is None or best.tokens_per_second >= throughput,
    ]
    if not alone[0]:
        least = f"{fastest.latency_seconds:.3g} s"
        yield f"max_latency of {latency:g} s cannot be met. The least that was found is {least}: allow that."
    if not alone[1]:
        yield (
            f"min_throughput of {throughput:g} tokens/s cannot be met. The most that was found is "
            f"{best.tokens_per_second:.3g} tokens/s, where {best.binding} binds: ask for that."
        )
    if all(alone):
        yield (
            f"max_latency of {latency:g} s and min_throughput of {throughput:g} tokens/s cannot be met together. "
            f"The least latency is {fastest.latency_seconds:.3g} s, with {fastest.tokens_per_second:.3g} tokens/s; the most is "
            f"{best.tokens_per_second:.3g} tokens/s, with a latency of {best.latency_seconds:.3g} s."
        )

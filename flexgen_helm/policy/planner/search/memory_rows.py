"""Memory as linear functions of shares, one row for each tier.

`MemoryPlan` is the one place that computes bytes. Here it is evaluated at a few placements: what a whole placement takes on a
tier is the factor of that tier's share, and what a mixed one takes beyond is constant (slots, buffers, working memory). So a
row is exact to within a unit of the weights; whoever rounds shares asks `MemoryPlan` again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from flexgen_helm.policy.cache_plan import CACHE_SHARE, CachePlan
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.search.candidate import Candidate, with_shares
from flexgen_helm.policy.planner.search.linear import Linear
from flexgen_helm.policy.space import Space
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.types import ON_DEVICE, TIERS, Shares, Tier


class MemoryRow(NamedTuple):
    """Bytes that a tier takes, and bytes that it has."""

    name: str
    tier: Tier
    taken: Linear
    available: int


class Placements:
    """Plans of one model in one space. Placements of weights are kept, since many candidates share them."""

    def __init__(self, shapes: ModelShapes, space: Space) -> None:
        """Make no plan yet.

        Args:
            shapes: Sizes of the model.
            space: Bytes of each tier that may be used.
        """
        self.shapes, self.space = shapes, space
        self._weights: dict[tuple[Shares, int], WeightPlan] = {}
        self._slopes: dict[Tier, float] = {}

    def plan(self, candidate: Candidate, weights: Shares, cache: Shares) -> MemoryPlan:
        """Return the plan of a candidate with given shares, whether it fits or not."""
        policy = with_shares(candidate, weights, cache, ON_DEVICE)
        plan = CachePlan.of(self.shapes, policy, own_memory=self.space.own_memory)
        return MemoryPlan(self.shapes, policy, self.space, self._placed(weights, policy.prefetch), plan)

    def slope(self, tier: Tier) -> float:
        """Return the bytes of a tier for the whole of the weights there."""
        if tier not in self._slopes:
            whole = self._placed(only(tier), 1)
            share = whole.shares[TIERS.index(tier)]
            self._slopes[tier] = whole.weight_bytes[tier] / share if share else 0.0
        return self._slopes[tier]

    def _placed(self, shares: Shares, prefetch: int) -> WeightPlan:
        key = shares, prefetch
        if key not in self._weights:
            own_memory = self.space.own_memory
            self._weights[key] = WeightPlan.by_shares(self.shapes, shares, own_memory=own_memory, prefetch=prefetch)
        return self._weights[key]


def mixed(tiers: Shares) -> Shares:
    """Return equal shares of the tiers that may be used."""
    count = sum(tiers)
    return tiers[0] / count, tiers[1] / count, tiers[2] / count


def memory_rows(placements: Placements, candidate: Candidate, cache_bytes: float) -> Iterator[MemoryRow]:
    """Yield the rows of a candidate.

    Args:
        placements: Plans of the model.
        candidate: Integers and tiers.
        cache_bytes: Bytes of K and V of its live sequences.
    """
    shapes, space = placements.shapes, placements.space
    middle = placements.plan(candidate, mixed(candidate.weights), mixed(candidate.cache))
    slopes = {tier: placements.slope(tier) for tier in TIERS}
    realised = dict(zip(TIERS, middle.weights.shares, strict=True))
    needed, stored = dict(middle.weights.needed_bytes), dict(middle.weights.weight_bytes)
    weights = {tier: Linear.of("weights", {tier: slopes[tier]}) + -slopes[tier] * realised[tier] for tier in TIERS}
    rows = {tier: weights[tier] + needed[tier] for tier in TIERS}
    rows["device"] += middle.working_bytes
    loading = weights["host"] + stored["host"] + shapes.loading_bytes
    if not space.own_memory:
        rows["host"] += rows.pop("device")
        loading += weights["device"] + stored["device"]
    cache = _cache(placements, candidate, max(cache_bytes, _least(middle)))
    for tier, taken in rows.items():
        whole = taken + cache[tier] + middle.cache.buffer_bytes[tier]
        yield MemoryRow(f"memory of the {tier}", tier, whole, space.of(tier))
    yield MemoryRow("memory of the host while weights are loaded", "host", loading, space.of("host"))


def _cache(placements: Placements, candidate: Candidate, cache_bytes: float) -> dict[Tier, Linear]:
    """Return the bytes of each tier for K and V, slots of loaded pages included."""
    taken: dict[Tier, dict[Tier, float]] = {tier: {} for tier in TIERS}
    for stored in TIERS:
        for tier, factor in placements.plan(candidate, ON_DEVICE, only(stored)).cache.taken.items():
            taken[tier][stored] = factor * cache_bytes / CACHE_SHARE
    return {tier: Linear.of("cache", factors) for tier, factors in taken.items()}


def _least(plan: MemoryPlan) -> float:
    """Return the bytes of K and V for which every plan has room."""
    tier = max(plan.cache.taken, key=lambda tier: plan.cache.taken[tier])
    return (plan.cache.least_bytes[tier] - plan.cache.buffer_bytes[tier]) * CACHE_SHARE / plan.cache.taken[tier]


def only(tier: Tier) -> Shares:
    """Return shares that put all on one tier."""
    device, host, disk = (float(each == tier) for each in TIERS)
    return device, host, disk

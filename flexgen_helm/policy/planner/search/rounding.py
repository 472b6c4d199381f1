"""Rounding: from the shares of the linear programme to plans of whole layers that fit (no torch)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from flexgen_helm.errors import PolicyError
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.policy.planner.search.candidate import Candidate, with_shares
from flexgen_helm.policy.planner.search.memory_rows import Placements, mixed
from flexgen_helm.policy.planner.search.programme import Solution
from flexgen_helm.policy.space import Space
from flexgen_helm.types import ON_DEVICE, TIERS, Policy, Shares

SMALL = 1e-3
"""Share of K and V, or of hidden states, below which a tier is left out."""
MOST_MOVES = 6
"""Most layers that are moved to a slower tier until a rounded plan fits."""


def realised_plans(solution: Solution, placements: Placements, asked: Policy) -> list[MemoryPlan]:
    """Return the plans next to a solution that fit: weights rounded to whole layers in every direction.

    Args:
        solution: Shares of the linear programme.
        placements: Plans of the model.
        asked: Policy of the user, whose shares are kept as they are.
    """
    shapes, space = placements.shapes, placements.space
    cache, hidden = _cleaned(solution.shares["cache"]), _cleaned(solution.shares["hidden"])
    if asked.weights is not None:
        every: list[Shares] = [asked.weights]
    else:
        every = list(_rounded(solution, placements))
    found: list[MemoryPlan] = []
    for weights in every:
        plan = _first_that_fits(solution, shapes, space, (weights, cache, hidden), asked)
        if plan is not None and plan.weights.tiers not in [other.weights.tiers for other in found]:
            found.append(plan)
    return found


def _rounded(solution: Solution, placements: Placements) -> Iterator[Shares]:
    """Yield shares of whole layers: those on the device and on the disk rounded down and up, the rest on the host.

    The embedding tables lie where `WeightPlan` puts them, so they are taken out of the shares first.
    """
    candidate, shapes = solution.candidate, placements.shapes
    total = shapes.total_bytes
    middle = placements.plan(candidate, mixed(candidate.weights), mixed(candidate.cache))
    tables, layers = shapes.stored_bytes[EMBEDDINGS], len(shapes.bound_bytes)
    size = (total - tables) / layers
    bounds = []
    for tier, share in (("device", solution.shares["weights"][0]), ("disk", solution.shares["weights"][2])):
        count = max(0.0, share * total - tables * (middle.weights.tiers[EMBEDDINGS] == tier)) / size
        bounds.append(sorted({math.floor(count + 1e-6), math.ceil(count - 1e-6)}))
    whole = ON_DEVICE if candidate.weights == ON_DEVICE else None
    if whole is not None:
        yield whole
        return
    for on_device, on_disk in itertools.product(*bounds):
        device, disk = min(1.0, on_device * size / total), min(1.0, on_disk * size / total)
        if on_device == layers:
            yield ON_DEVICE
        elif not candidate.weights[1] and device + disk <= 1:
            host = 1 - device - disk
            yield device + (not on_disk) * host, 0.0, disk + (on_disk > 0) * host
        elif on_device + on_disk <= layers:
            yield _shares_of(placements, candidate, (on_device, layers - on_device - on_disk, on_disk))


def _shares_of(placements: Placements, candidate: Candidate, counts: tuple[int, int, int]) -> Shares:
    """Return shares for which `WeightPlan` puts so many layers on each tier, or nearly so where layers differ in size.

    It divides the embedding tables with the layers before it puts them where they may be, so their bytes count on the tier
    that they leave.
    """
    shapes = placements.shapes
    total, tables = shapes.total_bytes, shapes.stored_bytes[EMBEDDINGS]
    size, tried = (total - tables) / sum(counts), []
    for place in TIERS[::-1]:
        device, host, disk = (
            (count * size + tables * (tier == place)) / total for tier, count in zip(TIERS, counts, strict=True)
        )
        tried.append((device, host, disk))
        tiers = placements.plan(candidate, tried[-1], ON_DEVICE).weights.tiers
        if tuple(sum(tiers[j] == tier for j in shapes.bound_bytes) for tier in TIERS) == counts:
            return tried[-1]
    return tried[-1]


def _first_that_fits(
    solution: Solution, shapes: ModelShapes, space: Space, shares: tuple[Shares, Shares, Shares], asked: Policy
) -> MemoryPlan | None:
    """Return the plan, with as few layers as needed moved to the next slower tier that may be used; None: none fits."""
    weights, cache, hidden = shares
    step, tiers = 1 / len(shapes.bound_bytes), solution.candidate.weights
    for _ in range(MOST_MOVES):
        policy = with_shares(solution.candidate, weights, cache, hidden)
        try:
            return MemoryPlan.of(shapes, policy, space)
        except PolicyError:
            moved = None if asked.weights is not None else _moved(weights, tiers, step)
            if moved is None:
                return None
            weights = moved
    return None


def _moved(weights: Shares, tiers: Shares, step: float) -> Shares | None:
    """Return shares with one layer less on the fastest tier that has one; None: there is no slower tier."""
    device, host, disk = weights
    if device >= step / 2 and tiers[1]:
        return max(0.0, device - step), host + min(step, device), disk
    if device >= step / 2 and tiers[2]:
        return max(0.0, device - step), host, disk + min(step, device)
    if host >= step / 2 and tiers[2]:
        return device, max(0.0, host - step), disk + min(step, host)
    return None


def _cleaned(shares: Shares) -> Shares:
    kept = [share if share >= SMALL else 0.0 for share in shares]
    if not any(kept):
        return ON_DEVICE
    device, host, disk = (share / sum(kept) for share in kept)
    return device, host, disk

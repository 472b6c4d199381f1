"""Gains: what one more GiB of a tier, or weights of 4 bits, would bring by the closed form. No torch.

They are the dual values of the memory rows, found by solving again with more memory: the integers may change too, which the
values of one linear programme do not show.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen_helm.errors import PolicyError
from flexgen_helm.policy.planner.search.choose import Problem, solutions
from flexgen_helm.policy.planner.search.variants import with_packed_weights
from flexgen_helm.types import TIERS, Tier

MORE_BYTES = 2**30
PACKED_BITS, PACKED_FORMAT = 4.5, "w4"


def gains(problem: Problem) -> dict[str, float]:
    """Return the share of the run's speed that each change would add; a change that cannot be predicted is left out.

    Args:
        problem: What was searched for.
    """
    now = _least_seconds(problem)
    if now is None:
        return {}
    found = {}
    for tier in TIERS:
        if tier in problem.constraints.tiers and (problem.space.own_memory or tier != "device"):
            found[f"1 GiB more {tier}"] = _with_more(problem, tier)
    if not problem.shapes.is_packed:
        packed = with_packed_weights(problem.shapes, PACKED_BITS, PACKED_FORMAT)
        found["weights of 4 bits"] = _least_seconds(replace(problem, shapes=packed))
    return {name: max(0.0, now / then - 1) for name, then in found.items() if then is not None}


def _with_more(problem: Problem, tier: Tier) -> float | None:
    available = {**problem.space.available, tier: problem.space.available[tier] + MORE_BYTES}
    if not problem.space.own_memory and tier == "host":
        available["device"] = available["host"]
    return _least_seconds(replace(problem, space=replace(problem.space, available=available)))


def _least_seconds(problem: Problem) -> float | None:
    try:
        return min((each.seconds for each in solutions(problem)), default=None)
    except PolicyError:  # a rate that the profile lacks
        return None

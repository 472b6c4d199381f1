"""Shares of the programme and what is made of them: tiers that may be used, and whole layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import pytest

from flexgen_helm.policy.planner.search.choice import Constraints
from flexgen_helm.policy.planner.search.choose import Problem, default_policy, solutions
from flexgen_helm.policy.planner.search.programme import Solution
from flexgen_helm.policy.planner.search.rounding import realised_plans
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.types import TIERS, Policy, Tier
from tests.policy.planner.made import cpu, model, space_of, t4

LAYERS = 24
SHAPES = model(LAYERS, 2048, 16)
"""2.4 GB of layers, on machines of which neither device nor RAM holds them all."""


@lru_cache
def problem(own_memory: bool, off: Tier | None) -> Problem:
    profile = t4(1, 3 if off == "disk" else 1.5, 100) if own_memory else cpu(1.5)  # without a disk, all must fit in RAM
    space, asked = space_of(profile), Policy(gpu_batch_size=16, gpu_batch_tokens=256)
    constraints = Constraints(tiers=frozenset(TIERS) - {off})
    base = default_policy(SHAPES, profile, space, asked, tiers=constraints.tiers)
    return Problem(SHAPES, Workload.uniform(64, 100, 8), profile, space, asked, constraints, base)


@lru_cache
def found(own_memory: bool, off: Tier | None) -> Sequence[Solution]:
    return solutions(problem(own_memory, off))


@pytest.mark.parametrize("own_memory", [True, False])
def test_what_is_kept_off_a_tier_gets_no_share_of_it(own_memory: bool) -> None:
    for off in ("host", "disk") if own_memory else (None,):
        forbidden = "host" if off is None else off  # one RAM: hidden states, K and V are on the device by name
        solutions = found(own_memory, off)
        assert solutions
        for solution in solutions:
            for what, shares in solution.shares.items():
                assert (off is None and what == "weights") or shares[TIERS.index(forbidden)] == 0


@pytest.mark.parametrize("own_memory", [True, False])
def test_layers_on_disk_are_rounded_down_and_up(own_memory: bool) -> None:
    """By hand: a share of all bytes over the bytes of a layer; embedding tables are never on disk."""
    asked, checked = problem(own_memory, None), 0
    for solution in found(own_memory, None)[:8]:
        meant = solution.shares["weights"][2] * SHAPES.total_bytes / SHAPES.bound_bytes[0]
        if not 0.1 < meant % 1 < 0.9:
            continue
        plans = realised_plans(solution, asked.model.placements, asked.asked)
        counts = [list(plan.weights.tiers.values()).count("disk") for plan in plans]
        assert {math.floor(meant), math.ceil(meant)} >= set(counts)
        assert math.ceil(meant) in counts
        checked += 1
    assert checked

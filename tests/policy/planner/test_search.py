"""The search: near the best that brute force over the simulator finds, and never beyond what memory and user allow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from flexgen_helm.errors import OutOfSpace, PolicyError
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.search.choice import Choice, Constraints
from flexgen_helm.policy.planner.search.choose import choose_policy, default_policy
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.types import ON_DEVICE, ON_HOST, Shares
from tests.policy.planner.triples import Triple, random_triple

TIMES_SLOWER = 1.03
"""How much slower than the best policy of the brute force a choice may be."""


def chosen(triple: Triple, constraints: Constraints = Constraints()) -> Choice:  # noqa: B008  # it is frozen
    return choose_policy(
        triple.shapes, triple.workload, triple.profile, triple.space, asked=triple.asked, constraints=constraints
    )


def every_plan(triple: Triple, quarters: int) -> Iterator[MemoryPlan]:
    """Yield plans over a grid of sizes and shares that fit."""
    base = default_policy(triple.shapes, triple.profile, triple.space, triple.asked)
    parts = [each / quarters for each in range(quarters + 1)]
    weights: list[Shares] = [(a, b, 1 - a - b) for a, b in itertools.product(parts, parts) if a + b <= 1]
    caches: list[Shares] = [ON_DEVICE, ON_HOST, (0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.0, 1.0)]
    if not triple.space.own_memory:
        weights = [(0.0, 1 - part, part) for part in parts]
        caches = [ON_DEVICE, (0.5, 0.0, 0.5), (0.0, 0.0, 1.0)]
    for shares, cache, count, tokens in itertools.product(weights, caches, (1, 2, 4), (64, 256, 1024)):
        try:
            policy = replace(base, weights=shares, cache=cache, num_gpu_batches=count, block_tokens=tokens)
            yield MemoryPlan.of(triple.shapes, policy, triple.space)
        except PolicyError:
            continue


def best_seconds(triple: Triple, quarters: int, every: int) -> float:
    """Return the least time of each ``every``-th plan of the grid."""
    found = []
    for plan in itertools.islice(every_plan(triple, quarters), 0, None, every):
        try:
            found.append(simulate(plan, triple.workload, triple.profile).seconds)
        except (PolicyError, OutOfSpace):
            continue
    return min(found)


def check_against_brute_force(seed: int, quarters: int, every: int) -> float:
    triple = random_triple(seed)
    choice = chosen(triple)
    best = best_seconds(triple, quarters, every)
    print(seed, choice.prediction.seconds / best, choice.policy, choice.reason)
    return choice.prediction.seconds / best


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_is_near_the_best_of_brute_force(seed: int) -> None:
    assert check_against_brute_force(seed, 2, 7) <= TIMES_SLOWER

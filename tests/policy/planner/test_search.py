"""The search: near the best that brute force over the simulator finds, and never beyond what memory and user allow."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.errors import OutOfSpace, PolicyError
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.search.choice import Choice, Constraints
from flexgen_helm.policy.planner.search.choose import Problem, choose_policy, default_policy
from flexgen_helm.policy.planner.search.refusal import PRECISION, missing_bytes
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.types import ON_DEVICE, ON_HOST, TIERS, Policy, Shares, Tier
from tests.policy.planner.made import cpu, model, space_of
from tests.policy.planner.triples import Triple, random_triple

TIMES_SLOWER = 1.03
"""How much slower than the best policy of the brute force a choice may be."""


def chosen(triple: Triple, constraints: Constraints = Constraints()) -> Choice:  # noqa: B008  # it is frozen
    return choose_policy(
        Problem.of(triple.shapes, triple.workload, triple.profile, triple.space, asked=triple.asked, constraints=constraints)
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


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_a_choice_is_near_the_best_of_brute_force(seed: int) -> None:
    triple = random_triple(seed)
    assert chosen(triple).prediction.seconds <= TIMES_SLOWER * best_seconds(triple, 2, 16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 40))
def test_a_choice_is_near_the_best_of_a_finer_brute_force(seed: int) -> None:
    triple = random_triple(seed)
    assert chosen(triple).prediction.seconds <= TIMES_SLOWER * best_seconds(triple, 2, 6)


CELLS = given(seed=st.integers(100, 10_000), off=st.sampled_from([None, "device", "disk"]), numerics=st.booleans())
FEW, MANY = settings(max_examples=2), settings(max_examples=20, deadline=None)


@FEW
@CELLS
def test_a_choice_fits_and_is_never_slower_than_the_default(seed: int, off: Tier | None, numerics: bool) -> None:
    check_choice(seed, off, numerics)


@pytest.mark.slow
@MANY
@CELLS
def test_choices_fit_and_are_never_slower_than_the_default(seed: int, off: Tier | None, numerics: bool) -> None:
    check_choice(seed, off, numerics)


def check_choice(seed: int, off: Tier | None, numerics: bool) -> None:
    """Choose for a random triple, and compare with its limits and the default policy."""
    triple = random_triple(seed)
    asked = Policy() if numerics else triple.asked
    constraints = Constraints(tiers=frozenset(TIERS) - {off}, search_numerics=numerics)
    try:
        choice = choose_policy(
            Problem.of(triple.shapes, triple.workload, triple.profile, triple.space, asked=asked, constraints=constraints)
        )
    except PolicyError:
        return
    plan = MemoryPlan.of(triple.shapes, choice.policy, triple.space)
    assert all(count <= triple.space.of(tier) for tier, count in plan.peak_bytes.items())
    for tier, least in plan.peak_bytes.items():  # with the smallest cache; the prediction's may be larger
        assert least <= choice.prediction.peak_bytes[tier] <= triple.space.of(tier)
    if choice.default is not None:
        assert choice.prediction.seconds <= choice.default.seconds
    if off is not None:
        assert not any(plan.weights.tiers[j] == off for j in triple.shapes.bound_bytes)
        assert choice.policy.cache[TIERS.index(off)] == choice.policy.hidden[TIERS.index(off)] == 0
    if not numerics:
        assert (choice.policy.gpu_batch_size, choice.policy.gpu_batch_tokens) == (8, 64)


def test_demands_are_kept_or_refused_with_what_would_be_possible() -> None:
    triple = random_triple(3)
    free = chosen(triple)
    best = free.prediction.tokens_per_second
    kept = chosen(triple, Constraints(min_throughput=0.9 * best))
    assert kept.prediction.tokens_per_second >= 0.9 * best
    with pytest.raises(PolicyError, match=r"cannot be met. The most that was found is"):
        chosen(triple, Constraints(min_throughput=2 * best))
    with pytest.raises(PolicyError, match=r"max_latency of 1e-06 s cannot be met. The least that was found is"):
        chosen(triple, Constraints(max_latency=1e-6))


def test_a_refusal_names_memory_that_is_enough_and_not_much_more() -> None:
    shapes, profile = model(12, 1024, 16), cpu()
    space = replace(space_of(profile), available={"device": 2**28, "host": 2**28, "disk": 2**40})
    no_disk = Constraints(tiers=frozenset({"device", "host"}))
    with pytest.raises(PolicyError, match=r"It would fit with [0-9.]+ GiB more memory"):
        choose_policy(Problem.of(shapes, Workload.uniform(4, 64, 4), profile, space, constraints=no_disk))
    base = default_policy(shapes, profile, space)
    missing = missing_bytes(shapes, base, space, no_disk, "host")
    assert missing is not None
    for more, fits in ((missing, True), (missing - 2 * PRECISION, False)):
        larger = replace(space, available={"device": 2**28 + more, "host": 2**28 + more, "disk": 2**40})
        small = replace(base, num_gpu_batches=1, block_tokens=base.gpu_batch_tokens, weights=ON_DEVICE)
        try:
            MemoryPlan.of(shapes, small, larger)
        except PolicyError:
            assert not fits
        else:
            assert fits


def test_a_model_that_fits_stays_whole_and_one_larger_than_ram_goes_to_disk() -> None:
    workload = Workload.uniform(16, 128, 8)
    small = choose_policy(Problem.of(model(12, 1024, 16), workload, cpu(16), space_of(cpu(16))))
    assert MemoryPlan.of(model(12, 1024, 16), small.policy, space_of(cpu(16))).weights.is_resident
    large = choose_policy(Problem.of(model(32, 4096, 32), workload, cpu(8), space_of(cpu(8))))
    assert MemoryPlan.of(model(32, 4096, 32), large.policy, space_of(cpu(8))).weights.shares[2] > 0


def test_scoring_gets_larger_blocks_than_generation() -> None:
    """Scoring keeps no K and V, so a block is bounded by hidden states alone, and each reading of the weights serves it all."""
    shapes, profile = model(12, 2048, 16), cpu(0.9)
    works = Workload.uniform(30, 256, 0, score=True), Workload.uniform(30, 256, 16)
    scoring, generation = (choose_policy(Problem.of(shapes, work, profile, space_of(profile))).prediction for work in works)
    assert scoring.prompt_tokens / scoring.sweeps > generation.prompt_tokens / generation.sweeps

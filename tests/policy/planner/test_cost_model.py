"""The closed form: FlexGen's formulas where both say the same, the simulator's counts, and memory from `MemoryPlan`."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.search.candidate import Candidate, Sweeps
from flexgen_helm.policy.planner.search.choice import Constraints
from flexgen_helm.policy.planner.search.choose import Problem, default_policy, solutions
from flexgen_helm.policy.planner.search.cost_model import CostModel
from flexgen_helm.policy.planner.search.features import Features
from flexgen_helm.policy.planner.search.linear import Linear, What
from flexgen_helm.policy.planner.search.memory_rows import Placements, memory_rows
from flexgen_helm.policy.planner.search.programme import Formulation, solve
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload
from flexgen_helm.types import ON_DEVICE, ON_HOST, TIERS, ResolvedPolicy, Shares
from tests.policy.planner.made import GIB, cpu, model, space_of, t4
from tests.policy.planner.triples import random_triple

S, N, HIDDEN, LAYERS = 512, 32, 7168, 48
OPT_30B = model(LAYERS, HIDDEN, 56)
EVERYWHERE: Shares = (1.0, 1.0, 1.0)


def candidate(live: int = 144, **fields: object) -> Candidate:
    named = {"gpu_batch_size": 48, "gpu_batch_tokens": 4096, "block_tokens": live * S, "cpu_attention": 1.0, **fields}
    return Candidate(ResolvedPolicy(**named), live, EVERYWHERE, EVERYWHERE)  # type: ignore[arg-type]


def cost_model(num_jobs: int = 144) -> CostModel:
    profile = t4()
    return CostModel(Placements(OPT_30B, space_of(profile)), profile, Features.of(Workload.uniform(num_jobs, S, N)))


def shares(weights: Shares, cache: Shares = ON_HOST, hidden: Shares = ON_DEVICE) -> dict[What, Shares]:
    return {"weights": weights, "cache": cache, "hidden": hidden}


def used_tiers(given: Shares) -> Shares:
    device, host, disk = (float(share > 0) for share in given)
    return device, host, disk


def test_links_take_the_time_of_the_papers_formulas() -> None:
    """Appendix A.3 for one layer times l: ctog_g and dtoc_g with weights and hidden states, ctod_p with K and V of a prompt."""
    costs, block = cost_model(), 144
    decode, prompt = (costs.busy(kind, candidate()) for kind in ("decode", "prompt"))
    w_i = 8 * HIDDEN**2 + 4 * HIDDEN * 4 * HIDDEN
    placed = shares((0.2, 0.5, 0.3), ON_HOST)
    embeddings = 1 - LAYERS * w_i / OPT_30B.total_bytes  # shares count them, the paper's do not
    streamed = LAYERS * w_i / (1 - embeddings)
    assert decode["host_to_device"].at(placed) == pytest.approx(0.8 * streamed / 12e9, rel=0.03)
    assert decode["disk_read"].at(placed) == pytest.approx(0.3 * LAYERS * w_i / (1 - embeddings) / 2e9, rel=0.03)
    on_disk = shares(ON_DEVICE, (0.0, 0.0, 1.0))
    kv = 4 * block * (S + 32) * HIDDEN * LAYERS  # 4 cd bls (s + 1) h1; the new token's page is written whole
    assert prompt["disk_write"].at(on_disk) == pytest.approx(kv / 1e9, rel=0.03)
    read = 4 * block * (S + N / 2) * HIDDEN * LAYERS  # 4 cd bls (s + n / 2) h1
    assert decode["disk_read"].at(on_disk) == pytest.approx(read / 2e9, rel=0.05)
    hidden = shares(ON_DEVICE, ON_DEVICE, ON_HOST)
    moved = 2 * block * HIDDEN * LAYERS  # 2 hc h1 bls
    assert decode["device_to_host"].at(hidden) == pytest.approx(moved / 12e9, rel=0.01)


def test_attention_on_the_cpu_takes_the_time_of_the_bytes_it_reads() -> None:
    """Appendix A.3, the part of comp_g for the CPU, with bytes over their rate in place of operations."""
    busy = cost_model().busy("decode", candidate())
    read = 4 * 144 * 640 * HIDDEN * LAYERS  # positions 512 to 543 are in the fifth chunk of 128, and chunks are read whole
    on_host, on_device = (busy["host"].at(shares(ON_DEVICE, cache)) for cache in (ON_HOST, ON_DEVICE))
    assert on_device == 0
    assert on_host == pytest.approx(read / 20e9, rel=0.05)  # and queries over the link


def test_both_directions_of_a_link_are_slower_together() -> None:
    """2 s and 1 s, at 0.8 of both rates while both are busy: 1.25 s together, then 1 s for the rest of the longer one."""
    busy = {"host_to_device": Linear(2.0), "device_to_host": Linear(1.0)}
    assert max(each.at({}) for each in cost_model().joint(busy)) == pytest.approx(2.25)


@pytest.mark.parametrize(
    ("live", "block_tokens", "expected"),
    [
        (64, 64 * S, (2, 62)),  # two rounds of 32 sweeps, of which the first computes all prompts
        (64, 16 * S, (8, 59)),  # four groups of 16: the last round begins with sweep 33 and its last group ends 34 later
        (128, 2 * S, (64, 31)),  # prompts bind: a group of two enters in each sweep
    ],
)
def test_sweeps_of_groups_that_enter_and_leave(live: int, block_tokens: int, expected: tuple[int, int]) -> None:
    """By hand for 128 jobs of 512 + 32 tokens."""
    sweeps = Sweeps.of(Features.of(Workload.uniform(128, S, N)), live, block_tokens)
    assert (sweeps.prompt, sweeps.decode) == expected


@pytest.mark.parametrize("seed", range(6))
def test_sweeps_are_counted_as_the_scheduler_plans_them(seed: int) -> None:
    triple = random_triple(seed)
    base = default_policy(triple.shapes, triple.profile, triple.space, triple.asked)
    large = replace(triple.space, available=dict.fromkeys(TIERS, 2**40))
    for tokens, count in itertools.product((64, 256), (1, 2)):
        policy = replace(base, block_tokens=tokens, num_gpu_batches=count, weights=ON_DEVICE, cache=ON_DEVICE)
        counted = Sweeps.of(Features.of(triple.workload), policy.block_size, tokens).total
        planned = simulate(MemoryPlan.of(triple.shapes, policy, large), triple.workload, triple.profile).sweeps
        assert counted == pytest.approx(planned, rel=0.35, abs=2)


def test_features_of_a_mixture() -> None:
    """Two prompts that share 40 tokens, one of which only is scored, and one that is asked for twice."""
    shared = tuple(range(40))
    generating = PlannedPrompt((*shared, *range(100, 130)), (3,))
    scored = PlannedPrompt((*shared, *range(200, 220)), (), score=True)
    found = Features.of(Workload.of((generating, scored, replace(generating, new_tokens=(5,)))))
    assert found.prompt_tokens == 40 + 30 + 20
    assert found.kept_tokens == 70
    assert (found.sequences, found.steps, found.longest, found.new_tokens) == (2, 2 + 4, 4, 8)
    assert found.context == pytest.approx(((71 + 72) + (71 + 72 + 73 + 74)) / 6)  # prompt, tokens before, and its own
    assert found.scored_positions == 60
    assert found.earlier_keys == 0  # all within the first chunk of 128


@pytest.mark.parametrize("own_memory", [True, False])
@pytest.mark.parametrize("weights", [(0.3, 0.5, 0.2), (0.1, 0.9, 0.0), (0.0, 0.4, 0.6)])
def test_memory_rows_are_exact_to_within_a_unit(own_memory: bool, weights: Shares) -> None:
    profile = t4() if own_memory else cpu(200)
    if not own_memory:
        weights = (0.0, weights[0] + weights[1], weights[2])
    shapes, space = model(24, 2048, 16), space_of(profile)
    cache: Shares = (0.5, 0.0, 0.5) if not own_memory else (0.2, 0.5, 0.3)
    each = replace(candidate(), weights=used_tiers(weights), cache=used_tiers(cache))
    placements = Placements(shapes, space)
    plan = placements.plan(each, weights, cache)
    held = 8 * GIB
    capacities = plan.cache.capacities(plan.left(space.available), held)
    assert sum(capacities.values()) == pytest.approx(held, rel=1e-6), "there is room for all"
    realised: dict[What, Shares] = {"weights": plan.weights.shares, "cache": cache, "hidden": ON_DEVICE}
    taken = {row.name: row.taken.at(realised) for row in memory_rows(placements, each, held)}
    unit = max(shapes.stored_bytes.values())
    for tier in ("host", "disk") if not own_memory else TIERS:
        used: float = plan.weights.needed_bytes[tier] + (plan.working_bytes if tier == "device" else 0)
        if not own_memory and tier == "host":
            used += plan.weights.needed_bytes["device"] + plan.working_bytes
        used += held * plan.cache.taken[tier] / 0.95 + plan.cache.buffer_bytes[tier]
        assert taken[f"memory of the {tier}"] == pytest.approx(used, abs=1.01 * unit)


@pytest.mark.parametrize("seed", [0, 1, 5, 6])
def test_the_programme_finds_the_least_time_of_a_grid_of_shares(seed: int) -> None:
    """The reference is the best of all twentieths that keep the memory rows; shares between them may be a little better."""
    triple = random_triple(seed)
    base = default_policy(triple.shapes, triple.profile, triple.space, triple.asked)
    problem = Problem(triple.shapes, triple.workload, triple.profile, triple.space, triple.asked, Constraints(), base)
    parts = [each / 20 for each in range(21)]
    grid = [(a, b, max(0.0, 1 - a - b)) for a, b in itertools.product(parts, parts) if a + b <= 1 + 1e-9]
    for best in solutions(problem):
        rows = Formulation.of(problem.model, best.candidate)
        fixed: dict[What, Shares] = {"hidden": ON_DEVICE, "cache": best.shares["cache"]}
        allowed = [
            each for each in grid if all(use or not part for use, part in zip(best.candidate.weights, each, strict=True))
        ]
        placed = [{**fixed, "weights": weights} for weights in allowed]
        times = [rows.seconds(each) for each in placed if all(row.taken.at(each) <= row.available for row in rows.memory)]
        if times:
            break
    solved = solve([rows], fixed)[0]
    assert solved.violations == {}
    assert solved.seconds <= min(times) * (1 + 1e-6)
    assert all(row.taken.at(solved.shares) <= row.available * (1 + 1e-5) for row in rows.memory)

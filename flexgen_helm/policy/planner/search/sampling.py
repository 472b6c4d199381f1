"""Sampling: a run from a replay of a few sweeps of each kind. No torch.

Between the closed form, which overlaps everything, and the simulation of every sweep, which takes as long as the scheduler: a
block is walked through as a whole (`levels`), and each level takes as long as its busiest resource, times what a replay with
all dependencies takes longer than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np

from flexgen_helm.errors import PolicyError
from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.policy.capacity import PROMPT_ROW_COST, Capacity
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.fluid import Mark
from flexgen_helm.policy.planner.loads import RowLoad, SweepLoad
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.candidate import Candidate, SweepKind
from flexgen_helm.policy.planner.search.cost_model import CostModel
from flexgen_helm.policy.planner.search.levels import Level, levels
from flexgen_helm.policy.planner.simulate import NOTHING, sweep_cost
from flexgen_helm.policy.planner.totals import Totals
from flexgen_helm.schedule.prompt_gate import PromptGate
from flexgen_helm.schedule.rows import in_order, spread
from flexgen_helm.types import ON_DEVICE, TIERS, Tier

REPLAYS = 3
"""Most sweeps of each kind that are replayed: those with the fewest and the most sequences, and one between."""


def sampled(model: CostModel, candidate: Candidate, plan: MemoryPlan) -> Prediction:
    """Predict a run.

    Args:
        model: Cost model of the workload.
        candidate: Integers of the plan.
        plan: The plan.

    Raises:
        PolicyError: If the profile lacks a rate that the policy needs, or the cache holds no sequence.
    """
    live = min(candidate.live, _fitting(model, plan))
    if live < 1:
        raise PolicyError("The cache of this plan holds no sequence of the workload.")
    candidate = replace(candidate, live=live)
    sweeps, durations = model.sweeps(candidate), Durations(plan, model.profile)
    tokens = candidate.policy.block_tokens
    assert tokens is not None, "a candidate's block_tokens are decided"
    row_cost = 0.0 if plan.space.is_gpu else PROMPT_ROW_COST
    gate = PromptGate(row_tokens=candidate.policy.gpu_batch_tokens, block_tokens=tokens, row_cost=row_cost)
    found = levels(sweeps, model.features, live, gate)
    costs = _costs(model, durations, found, [_sweep(model, level, candidate, durations) for level in found])
    total = NOTHING
    for level, cost in zip(found, costs, strict=True):
        total = total.plus(cost, level.count)
    features = model.features
    cache = model.cache_bytes(live, plan.cache) if features.sequences else 0.0
    if plan.space.is_gpu:  # whose pages are made at their capacity
        cache = sum(Capacity.of(plan, plan.space.available).cache_bytes.values())
    taken = plan.cache.taken_bytes(cache)
    return Prediction(
        policy=replace(plan.policy, weights=plan.weights.shares),
        seconds=total.seconds,
        prompt_tokens=features.prompt_tokens,
        generated_tokens=features.new_tokens,
        sweeps=round(sum(level.count for level in found)),
        peak_bytes=plan.peak_with(taken),
        running_bytes=plan.running_with(taken),
        bytes_moved={name: round(count) for name, count in total.moved.items() if count},
        busy_seconds=total.busy,
        latency_seconds=sum(level.first * cost.seconds for level, cost in zip(found, costs, strict=True)),
    )


def _costs(model: CostModel, durations: Durations, found: Sequence[Level], loads: Sequence[SweepLoad]) -> list[Mark]:
    """Return what the sweeps of each level take, behind one like them.

    Args:
        model: Cost model of the workload.
        durations: Stages of operations.
        found: The levels, those of each kind by the number of sequences that decode.
        loads: A sweep of each.
    """
    totals = Totals(durations)
    costs = [totals.of(load) for load in loads]
    for kind in get_args(SweepKind):
        numbers = [i for i, level in enumerate(found) if level.kind == kind]
        chosen = sorted({numbers[(len(numbers) - 1) * i // (REPLAYS - 1)] for i in range(REPLAYS)}) if numbers else []
        ratios = [_seconds(model, durations, loads[i]) / costs[i].seconds for i in chosen]
        for i in numbers:
            costs[i] = costs[i]._replace(seconds=costs[i].seconds * float(np.interp(i, chosen, ratios)))
    return costs


def _seconds(model: CostModel, durations: Durations, load: SweepLoad) -> float:
    """Return how long a sweep takes behind one like it.

    Most of a search's time is replays, and sweeps of plans whose blocks differ are often equal, so each is replayed once.
    """
    weights = durations.plan.weights
    # What a block holds, and where it lies, is in the rows.
    sizes = replace(durations.plan.policy, num_gpu_batches=1, block_tokens=None, weights=None, cache=ON_DEVICE)
    key = tuple(weights.tiers.items()), weights.prefetch, sizes, load.rows, load.logits
    if key not in model.replayed:
        model.replayed[key] = sweep_cost(durations, load).seconds
    return model.replayed[key]


def _fitting(model: CostModel, plan: MemoryPlan) -> int:
    """Return how many live sequences the cache of a plan holds: fewer than meant where whole layers took its memory."""
    room = sum(Capacity.of(plan, plan.space.available).cache_bytes.values())
    shared, one = (model.cache_bytes(live, plan.cache) for live in (0, 1))
    return int((room - shared) / max(1.0, one - shared)) if model.features.sequences else plan.policy.block_size


def _sweep(model: CostModel, level: Level, candidate: Candidate, durations: Durations) -> SweepLoad:
    """Return a sweep of a level."""
    kind, sweeps = level.kind, level.sweeps
    rows = model.rows(kind, candidate, sweeps)
    prompts: list[RowLoad] = []
    decoding: list[RowLoad] = []
    read, new = model.pages(kind, sweeps)
    count = rows["decode"]
    if prefill := rows.get("prefill", 0):
        row = model.prompt_row(durations, sweeps, prefill)
        written = (new - sweeps.live) / prefill
        prompts = [_with_pages(row, durations.plan, 0.0, max(0.0, written))] * prefill
    if count:
        row = model.decode_row(durations, sweeps, count)
        policy = durations.plan.policy
        on_host = policy.cpu_attention if model.profile.own_memory and policy.cache[1] else 0.0
        for attends in spread(count, on_host):
            decoding.append(_with_pages(replace(row, on_host=attends), durations.plan, read / count, sweeps.live / count))
    found = in_order(prompts, decoding, durations.plan.policy)
    return SweepLoad(tuple(found), model.logits(kind, sweeps), 0, 0)


def _with_pages(row: RowLoad, plan: MemoryPlan, read: float, new: float) -> RowLoad:
    """Return a row that brings and takes away its part of the pages on each tier from which they must be brought."""
    form: Form = "sealed" if "sealed" in plan.shapes.page_shares else "exact"
    brought: list[tuple[Tier, Form, int]] = []
    taken: list[tuple[Tier, Form, int]] = []
    for tier, share in zip(TIERS, plan.policy.cache, strict=True):
        in_place = tier == "device" or (tier == "host" and (row.on_host or not plan.space.own_memory))
        if share and not in_place:
            brought.append((tier, form, round(share * read)))
            taken.append((tier, form, round(share * new)))
    return replace(row, brought=tuple(brought), taken=tuple(taken), stages=bool(brought))

"""Sampling: a run from a replay of one sweep of each kind. No torch.

Between the closed form, which overlaps everything, and the simulation of every sweep, which takes as long as the scheduler: the
sweeps are counted as the closed form counts them, and an average one of each kind is replayed with all its dependencies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from flexgen_helm.errors import PolicyError
from flexgen_helm.kv_cache.pages import Form
from flexgen_helm.policy.capacity import Capacity
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.loads import RowLoad, SweepLoad
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.candidate import Candidate, SweepKind
from flexgen_helm.policy.planner.search.cost_model import CostModel
from flexgen_helm.policy.planner.simulate import NOTHING, sweep_cost
from flexgen_helm.schedule.rows import in_order, spread
from flexgen_helm.types import TIERS, Tier


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
    counts, first = sweeps.counts, sweeps.first_counts
    costs = {
        kind: sweep_cost(durations, _sweep(model, kind, candidate, durations)) for kind in get_args(SweepKind) if counts[kind]
    }
    total = NOTHING
    for kind, cost in costs.items():
        total = total.plus(cost, counts[kind])
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
        sweeps=sweeps.total,
        peak_bytes=plan.peak_with(taken),
        running_bytes=plan.running_with(taken),
        bytes_moved={name: round(count) for name, count in total.moved.items() if count},
        busy_seconds=total.busy,
        latency_seconds=sum(first[kind] * cost.seconds for kind, cost in costs.items()),
    )


def _fitting(model: CostModel, plan: MemoryPlan) -> int:
    """Return how many live sequences the cache of a plan holds: fewer than meant where whole layers took its memory."""
    room = sum(Capacity.of(plan, plan.space.available).cache_bytes.values())
    shared, one = (model.cache_bytes(live, plan.cache) for live in (0, 1))
    return int((room - shared) / max(1.0, one - shared)) if model.features.sequences else plan.policy.block_size


def _sweep(model: CostModel, kind: SweepKind, candidate: Candidate, durations: Durations) -> SweepLoad:
    """Return an average sweep."""
    sweeps, rows = model.sweeps(candidate), model.rows(kind, candidate)
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

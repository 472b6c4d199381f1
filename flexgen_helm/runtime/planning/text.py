"""A plan in words and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flexgen_helm.memory.amounts import gib
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.choice import Choice
from flexgen_helm.policy.planner.search.choose import Problem
from flexgen_helm.types import TIERS, ResolvedPolicy

LEAST_GAIN = 0.001
"""Smallest part of the speed that is worth a line."""


class Planned(NamedTuple):
    """What was planned.

    Attributes:
        model: Name of the model.
        problem: What was searched for.
        choice: The policy and its prediction.
        gains: Part of the speed that each change would add; empty: not computed.
        others: What is predicted for other variants that were allowed.
        refused: Why there is no plan for the others.
    """

    model: str
    problem: Problem
    choice: Choice
    gains: Mapping[str, float] = {}
    others: Mapping[str, Prediction] = {}
    refused: Mapping[str, str] = {}


def as_json(planned: Planned) -> dict[str, Any]:
    """Return a plan in plain types."""
    made, default = planned.choice.prediction, planned.choice.default
    return {
        "model": planned.model,
        "machine": planned.problem.profile.name,
        "policy": dataclasses.asdict(_shown(planned.choice)),
        "tokens_per_second": made.tokens_per_second,
        "seconds": made.seconds,
        "latency_seconds": made.latency_seconds,
        "sweeps": made.sweeps,
        "prompt_tokens": made.prompt_tokens,
        "generated_tokens": made.generated_tokens,
        "peak_bytes": dict(made.peak_bytes),
        "bytes_moved": dict(made.bytes_moved),
        "busy_seconds": dict(made.busy_seconds),
        "binding": made.binding,
        "default_seconds": None if default is None else default.seconds,
        "gains": dict(planned.gains),
        "others": {name: each.tokens_per_second for name, each in planned.others.items()},
        "refused": dict(planned.refused),
        "reason": planned.choice.reason,
    }


def lines(planned: Planned) -> list[str]:
    """Return a plan as lines for a reader."""
    problem = planned.problem
    return list(_lines(planned, MemoryPlan.of(problem.shapes, planned.choice.policy, problem.space)))


def _lines(planned: Planned, plan: MemoryPlan) -> Iterator[str]:
    made, profile = planned.choice.prediction, planned.problem.profile
    yield f"{planned.model} on {profile.name} ({profile.device}, profile of {profile.date})"
    yield f"policy: {policy_text(_shown(planned.choice))}"
    yield f"        {planned.choice.reason}"
    yield f"weights: {plan.weights.describe()}"
    cache = plan.cache.capacities(plan.left(plan.space.available))
    yield "K and V: " + (
        ", ".join(f"up to {gib(count)} on the {tier}" for tier, count in cache.items() if count) or "none kept"
    )
    peaks = (f"{gib(count)} of {gib(plan.space.of(tier))} on the {tier}" for tier, count in made.peak_bytes.items())
    yield f"predicted peaks: {', '.join(peaks)}"
    unit = "new tokens" if made.generated_tokens else "prompt tokens"
    yield f"prediction: {made.tokens_per_second:.3g} {unit}/s, {_time(made)}, {made.sweeps:,} sweeps"
    yield f"binding: {_busy(made)}"
    for name, gain in planned.gains.items():
        if gain >= LEAST_GAIN:
            yield f"{name} would bring about {gain * made.tokens_per_second:.3g} {unit}/s more ({gain:.1%})"
    if planned.gains and max(planned.gains.values()) < LEAST_GAIN:
        yield "more memory would bring nothing"
    for name, other in planned.others.items():
        yield f"{name}: {other.tokens_per_second:.3g} {unit}/s"
    for name, reason in planned.refused.items():
        yield f"{name}: {reason}"


def _shown(choice: Choice) -> ResolvedPolicy:
    """Return the policy with shares of weights: those asked for, which give the same plan again, or else the realised ones."""
    return choice.policy if choice.policy.weights is not None else choice.prediction.policy


def policy_text(policy: ResolvedPolicy) -> str:
    """Return a policy as `--policy` reads it; shares of weights that are left open are left out."""
    parts = [f"{name}={getattr(policy, name)}" for name in ("gpu_batch_size", "num_gpu_batches", "gpu_batch_tokens")]
    if policy.block_tokens is not None:
        parts.append(f"block_tokens={policy.block_tokens}")
    shares = {"weights": policy.weights, "cache": policy.cache, "hidden": policy.hidden}
    parts += [f"{name}={':'.join(f'{share:.4g}' for share in each)}" for name, each in shares.items() if each is not None]
    return ",".join([*parts, f"cpu_attention={policy.cpu_attention:g}", f"prefetch={policy.prefetch}"])


def _time(made: Prediction) -> str:
    hours = f"{made.seconds / 3600:.2f} hours" if made.seconds >= 360 else f"{made.seconds:.3g} s"
    return f"{hours} in all, {made.latency_seconds:.3g} s until the first answer"


def _busy(made: Prediction) -> str:
    shares = sorted(((seconds / made.seconds, name) for name, seconds in made.busy_seconds.items() if seconds), reverse=True)
    return ", ".join(f"{name} busy {share:.0%}" for share, name in shares[: len(TIERS)])

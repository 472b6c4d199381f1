"""Search: the best policy for a workload on a machine (FlexGen section 4.3). No torch.

1. Integers are enumerated within the bound of `enumeration`, and the linear programme gives each its best shares (`programme`).
2. The best solutions are rounded to whole layers in every direction, and `MemoryPlan` refuses what does not fit (`rounding`).
3. A replay of one sweep of each kind ranks these plans, their neighbours and the default policy (`sampling`).
4. Where that takes well under a second, the simulator compares the best of them with the default, sweep by sweep.

So a choice is never worse than the default, by the simulator. No step depends on the time that it takes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

from flexgen_helm.errors import OutOfSpace, PolicyError
from flexgen_helm.kv_cache.pages import PAGE_TOKENS
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.attention_place import attention_place
from flexgen_helm.policy.default_rows import default_rows
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.candidate import Candidate, candidate_of
from flexgen_helm.policy.planner.search.choice import Choice, Constraints
from flexgen_helm.policy.planner.search.cost_model import CostModel
from flexgen_helm.policy.planner.search.enumeration import Bounds, candidates
from flexgen_helm.policy.planner.search.features import Features
from flexgen_helm.policy.planner.search.linear import What
from flexgen_helm.policy.planner.search.memory_rows import Placements
from flexgen_helm.policy.planner.search.programme import DEMANDS, Formulation, Limits, Solution, solve
from flexgen_helm.policy.planner.search.refusal import refuse
from flexgen_helm.policy.planner.search.rounding import realised_plans
from flexgen_helm.policy.planner.search.sampling import sampled
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.sweeps import ALIKE
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.types import ON_DEVICE, TIERS, Policy, ResolvedPolicy, Shares, Tier

RANKED, RANKED_NUMERICS = 12, 24
"""Plans that are ranked before the neighbours of the best one are, without and with row sizes that may change."""
SIMULATED = 4
"""Plans that are simulated, beside the default."""
MOST_STEPS = 9000
"""Work for which runs are simulated sweep by sweep, all together, in units of about 60 us: see `_affordable`."""
MOST_RUNS = 9
"""Most runs that are simulated sweep by sweep."""
STEPS_PER_PROMPT, STEPS_PER_SCORE = 3, 0.05
"""Such units for planning one prompt, and for one position that is scored."""
MOST_SQUARES = 2000
"""Rows times layers that are replayed, all plans together; the best ones come first, and at least one is replayed."""
PREFETCHES = (1, 2, 3)
"""Layers loaded ahead that are tried. The closed form overlaps everything, so only a replay tells them apart."""
WORTH = 0.005
"""Part of a run's time that a policy must save to replace the default: predictions are not more exact than that."""


@dataclass(frozen=True)
class Problem:
    """What is searched for.

    Attributes:
        shapes: Sizes of the model.
        workload: What is asked.
        profile: The machine.
        space: Bytes of each tier that may be used.
        asked: Policy of the user; what differs from the default is kept.
        constraints: Demands of the user.
        base: The default policy with row sizes and place of attention.
    """

    shapes: ModelShapes
    workload: Workload
    profile: MachineProfile
    space: Space
    asked: Policy
    constraints: Constraints
    base: ResolvedPolicy

    @classmethod
    def of(
        cls,
        shapes: ModelShapes,
        workload: Workload,
        profile: MachineProfile,
        space: Space,
        *,
        asked: Policy | None = None,
        constraints: Constraints | None = None,
    ) -> Problem:
        """Return a problem with the default policy that belongs to it; without ``asked`` and ``constraints`` all is free."""
        asked, constraints = asked or Policy(), constraints or Constraints()
        base = default_policy(shapes, profile, space, asked, tiers=constraints.tiers)
        return cls(shapes, workload, profile, space, asked, constraints, base)

    @cached_property
    def model(self) -> CostModel:
        """The closed form."""
        return CostModel(Placements(self.shapes, self.space), self.profile, Features.of(self.workload))

    @property
    def fixed(self) -> dict[What, Shares]:
        """Shares that the user decides."""
        found: dict[What, Shares] = {}
        if self.asked.weights is not None:
            found["weights"] = self.asked.weights
        if self.asked.cache is not None:
            found["cache"] = self.asked.cache
        if self.asked.hidden != ON_DEVICE:
            found["hidden"] = self.asked.hidden
        return found

    @property
    def limits(self) -> Limits:
        """Demands of the user in seconds."""
        least = self.constraints.min_throughput
        features = self.model.features
        run = (features.new_tokens or features.prompt_tokens) / least if least else None
        return Limits(self.constraints.max_latency, run)


def choose_policy(problem: Problem) -> Choice:
    """Choose the policy under which a workload takes least time on a machine.

    Args:
        problem: What is searched for.

    Raises:
        PolicyError: If no policy fits or keeps the constraints. The message names what cannot be met, and what would be enough.
    """
    constraints = problem.constraints
    default = _default(problem)
    ranked = _ranked(problem, default)
    if (runs := _affordable(problem)) > 1:
        default = default and _simulated(default, problem)
        ranked = list(_all_simulated(problem, default, ranked, runs))
    known = ([] if default is None else [default]) + ranked
    met = [each for each in known if constraints.met_by(each.prediction)]
    if not met:
        raise refuse(problem.shapes, problem.base, problem.space, constraints, [each.prediction for each in known])
    best = min(met, key=lambda each: each.prediction.seconds)
    if default is not None and default in met and default.prediction.seconds <= (1 + WORTH) * best.prediction.seconds:
        best = default
    others = sorted((each.prediction for each in known if each is not best), key=lambda each: each.seconds)
    plain = None if default is None else default.prediction
    # Not the realised shares: those of the embedding table would make another plan.
    return Choice(best.plan.policy, best.prediction, tuple(others), plain, _reason(best.prediction, plain))


def default_policy(
    shapes: ModelShapes,
    profile: MachineProfile,
    space: Space,
    asked: Policy | None = None,
    *,
    tiers: frozenset[Tier] = frozenset(TIERS),
) -> ResolvedPolicy:
    """Return the policy of an engine that searches nothing: row sizes by device, the place of attention by machine and limits.

    Args:
        shapes: Sizes of the model.
        profile: The machine.
        space: Bytes of each tier that may be used.
        asked: Policy of the user.
        tiers: Tiers that may be used; without the host the CPU attends to nothing beside a device.
    """
    asked = asked or Policy()
    size, tokens = default_rows(is_gpu=profile.is_gpu, threads=profile.threads)
    named = {field.name: getattr(asked, field.name) for field in dataclasses.fields(Policy)}
    named["gpu_batch_size"], named["gpu_batch_tokens"] = asked.gpu_batch_size or size, asked.gpu_batch_tokens or tokens
    base = ResolvedPolicy(**{name: value for name, value in named.items() if value is not None})
    if not profile.own_memory:
        return base
    if "host" not in tiers and asked.cpu_attention is None:
        return replace(base, cpu_attention=0.0)
    limits = {tier: min(profile.memory[tier], space.limits.get(tier, profile.memory[tier])) for tier in TIERS}
    machine = replace(space, available=limits)
    place = attention_place(asked, base, shapes, machine)
    return replace(base, cache=place.cache, cpu_attention=place.cpu_attention)


def solutions(problem: Problem) -> list[Solution]:
    """Return what the closed form says of all candidates that fit, the best first."""
    bounds = Bounds(problem.asked, problem.constraints.tiers, problem.constraints.search_numerics)
    rows = [Formulation.of(problem.model, each) for each in candidates(problem.model, problem.base, bounds)]
    solved = solve(rows, problem.fixed, problem.limits) if rows else []
    fitting = (each for each in solved if not each.violations.keys() - DEMANDS)  # whose times the closed form only estimates
    return sorted(fitting, key=lambda each: (bool(each.violations), each.seconds))


class _Tried(NamedTuple):
    """A plan and what is predicted for it."""

    candidate: Candidate
    plan: MemoryPlan
    prediction: Prediction


def _affordable(problem: Problem) -> int:
    """Return how many whole runs may be simulated."""
    features = problem.model.features
    steps = features.steps / ALIKE * max(1.0, features.context / PAGE_TOKENS)
    steps += STEPS_PER_PROMPT * len(problem.workload.prompts) + STEPS_PER_SCORE * features.scored_positions
    return min(MOST_RUNS, int(MOST_STEPS / max(1.0, steps)))


def _all_simulated(problem: Problem, default: _Tried | None, ranked: Sequence[_Tried], runs: int) -> Iterator[_Tried]:
    """Yield simulations of the best plans, then of plans with other blocks than the best one.

    Whole rows decide between those, which a replay of an average sweep does not count.
    """
    best = default
    for tried in ranked[:SIMULATED]:
        if (made := _simulated(tried, problem)) is not None:
            yield made
            best = made if best is None else min(best, made, key=partial(_key, problem))
    if best is None:
        return
    for candidate, plan in itertools.islice(_other_blocks(best, problem), max(0, runs - SIMULATED - 1)):
        if (made := _simulated(best._replace(candidate=candidate, plan=plan), problem)) is not None:
            yield made


def _other_blocks(best: _Tried, problem: Problem) -> Iterator[tuple[Candidate, MemoryPlan]]:
    policy, asked = best.plan.policy, problem.asked
    counts = [1, 2, 4] if asked.num_gpu_batches == Policy.num_gpu_batches else [policy.num_gpu_batches]
    tokens = [policy.gpu_batch_tokens * rows for rows in (4, 1, 16)] if asked.block_tokens is None else [asked.block_tokens]
    for block, count in itertools.product(tokens, counts):
        yield from _changed(best, problem, {"block_tokens": block, "num_gpu_batches": count})


def _simulated(tried: _Tried, problem: Problem) -> _Tried | None:
    """Return a plan with the prediction of the simulator; None: a prompt does not fit into its cache."""
    try:
        return tried._replace(prediction=simulate(tried.plan, problem.workload, problem.profile))
    except (OutOfSpace, PolicyError):
        return None


def _default(problem: Problem) -> _Tried | None:
    """Return the default policy; None: it does not fit or may not be used."""
    try:
        plan = MemoryPlan.of(problem.shapes, problem.base, problem.space, problem.asked)
    except PolicyError:
        return None
    tokens = plan.block_tokens(plan.left(problem.space.available))
    features = problem.model.features
    candidate = replace(
        candidate_of(replace(plan.policy, block_tokens=tokens)), live=min(features.sequences or 1, plan.policy.block_size)
    )
    return _try(candidate, plan, problem) if _allowed(plan, problem.constraints) else None


def _try(candidate: Candidate, plan: MemoryPlan, problem: Problem) -> _Tried | None:
    try:
        return _Tried(candidate, plan, sampled(problem.model, candidate, plan))
    except PolicyError:
        return None


def _ranked(problem: Problem, default: _Tried | None) -> list[_Tried]:
    """Return plans by a replay of their sweeps, the best first: those next to the best solutions, and neighbours of the best.

    The closed form overlaps everything, so no replay is faster than it: solutions that it says to be slower than what was
    replayed already are left out.
    """
    key = partial(_key, problem)
    found: list[_Tried] = []
    best, squares = default, 0
    for solution, plan in _best_plans(problem):
        if found and squares > MOST_SQUARES and not problem.constraints.search_numerics:
            break
        if best is not None and key(best) <= (False, (1 + WORTH) * solution.seconds):
            break
        squares += _squares(solution.candidate, problem)
        tried = _try(solution.candidate, plan, problem)
        if tried is not None:
            found.append(tried)
            best = tried if best is None else min(best, tried, key=key)
    if best is not None and best is not default:
        for candidate, plan in _neighbours(best, problem):
            squares += _squares(candidate, problem)
            tried = (
                _try(candidate, plan, problem) if squares <= 2 * MOST_SQUARES or problem.constraints.search_numerics else None
            )
            if tried is not None:
                found.append(tried)
    return sorted(found, key=key)


def _key(problem: Problem, tried: _Tried) -> tuple[bool, float]:
    """Return what plans are compared by: those that keep the constraints come first."""
    return not problem.constraints.met_by(tried.prediction), tried.prediction.seconds


def _squares(candidate: Candidate, problem: Problem) -> int:
    """Return the rows times layers of a sweep of each kind."""
    rows = {**problem.model.rows("prompt", candidate)}
    return (sum(rows.values()) + rows["decode"]) * problem.shapes.num_layers


def _best_plans(problem: Problem) -> Iterator[tuple[Solution, MemoryPlan]]:
    """Yield plans of whole layers for the best solutions."""
    seen: set[tuple[object, ...]] = set()
    for solution in solutions(problem):
        for plan in realised_plans(solution, problem.model.placements, problem.asked):
            if _identity(plan) not in seen and _allowed(plan, problem.constraints):
                seen.add(_identity(plan))
                yield solution, plan
            if len(seen) == (RANKED_NUMERICS if problem.constraints.search_numerics else RANKED):
                return


def _neighbours(best: _Tried, problem: Problem) -> Iterator[tuple[Candidate, MemoryPlan]]:
    """Yield plans that differ in what the closed form cannot tell apart: layers loaded ahead, tokens of a block."""
    policy, asked = best.plan.policy, problem.asked
    changes: list[dict[str, int]] = []
    if best.plan.weights.streamed and asked.prefetch == Policy.prefetch:
        changes += [{"prefetch": each} for each in PREFETCHES if each != policy.prefetch]
    if asked.block_tokens is None and policy.block_tokens is not None:
        row = policy.gpu_batch_tokens
        changes += [
            {"block_tokens": max(row, policy.block_tokens // 2 // row * row)},
            {"block_tokens": 2 * policy.block_tokens},
        ]
    for change in changes:
        yield from _changed(best, problem, change)


def _changed(best: _Tried, problem: Problem, change: Mapping[str, Any]) -> Iterator[tuple[Candidate, MemoryPlan]]:
    """Yield a plan with other integers, if it fits."""
    policy = replace(best.plan.policy, **change)
    with suppress(PolicyError):
        live = min(best.candidate.live, policy.block_size)
        yield replace(best.candidate, policy=policy, live=live), MemoryPlan.of(problem.shapes, policy, problem.space)


def _identity(plan: MemoryPlan) -> tuple[object, ...]:
    policy = plan.policy
    tiers = tuple(sorted(plan.weights.tiers.items()))
    sizes = policy.gpu_batch_size, policy.gpu_batch_tokens, policy.num_gpu_batches, policy.block_tokens, policy.prefetch
    return tiers, sizes, policy.cache, policy.hidden, policy.cpu_attention


def _allowed(plan: MemoryPlan, constraints: Constraints) -> bool:
    """Return whether a plan keeps off the tiers that may not be used; embedding tables alone may be anywhere."""
    off = [tier for tier in TIERS if tier not in constraints.tiers]
    units = {plan.weights.tiers[j] for j in plan.shapes.bound_bytes}
    shares: Mapping[str, Sequence[float]] = {"cache": plan.policy.cache, "hidden": plan.policy.hidden}
    return not any(tier in units or any(each[TIERS.index(tier)] for each in shares.values()) for tier in off)


def _reason(best: Prediction, default: Prediction | None) -> str:
    if default is None:
        return "the default policy does not fit or may not be used"
    if best is default:
        return "nothing that was tried is predicted to be faster than the default policy"
    return f"predicted to take {best.seconds / default.seconds:.0%} of the default policy's time; {best.binding} binds"

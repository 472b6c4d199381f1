"""Frontier of latency and throughput: blocks from one sequence to as many as fit (FlexGen, Fig. 1). No torch."""

from __future__ import annotations

from dataclasses import replace

from flexgen_helm.errors import PolicyError
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.choice import Constraints
from flexgen_helm.policy.planner.search.choose import Problem, solutions
from flexgen_helm.policy.planner.search.programme import Solution
from flexgen_helm.policy.planner.search.rounding import realised_plans
from flexgen_helm.policy.planner.search.sampling import sampled

MOST_POINTS = 12
"""Most points of a frontier."""


def frontier(problem: Problem) -> list[Prediction]:
    """Return predictions of which none is both later and slower than another, by latency.

    Args:
        problem: The search; its demands of latency and throughput do not count.
    """
    demands = problem.constraints
    free = Constraints(tiers=demands.tiers, search_numerics=demands.search_numerics)
    problem = replace(problem, constraints=free)
    fastest: dict[int, Solution] = {}
    for solution in solutions(problem):
        fastest.setdefault(solution.candidate.live, solution)
    made = [found for solution in list(fastest.values())[:MOST_POINTS] if (found := _predicted(solution, problem)) is not None]
    return [
        each
        for each in sorted(made, key=lambda each: each.latency_seconds)
        if not any(
            other.latency_seconds <= each.latency_seconds and other.tokens_per_second > each.tokens_per_second for other in made
        )
    ]


def _predicted(solution: Solution, problem: Problem) -> Prediction | None:
    for plan in realised_plans(solution, problem.model.placements, problem.asked):
        try:
            return sampled(problem.model, solution.candidate, plan)
        except PolicyError:
            continue
    return None

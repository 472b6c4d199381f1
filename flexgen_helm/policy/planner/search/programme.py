"""Linear programme of the shares (FlexGen section 4.3): for fixed integers, the shares that make a run shortest.

Variables: shares of weights, cache and hidden states on the tiers, and the time of a sweep with prompts and of one without. A
sweep is at least as long as each resource is busy; each tier holds what lies there. The programmes of many candidates have no
variable in common, so they are solved together: one start of the solver takes longer than all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, get_args

import pulp

from flexgen_helm.errors import FlexGenError
from flexgen_helm.policy.planner.search.candidate import Candidate, SweepKind
from flexgen_helm.policy.planner.search.cost_model import CostModel
from flexgen_helm.policy.planner.search.linear import Linear, What
from flexgen_helm.policy.planner.search.memory_rows import MemoryRow, memory_rows, mixed
from flexgen_helm.types import TIERS, Shares

KINDS: tuple[SweepKind, ...] = get_args(SweepKind)
EVERY_BUSY_SECOND = 1e-3
"""Weight of the time of resources that do not bind: of equally long runs that which moves least is best, since a real sweep
never overlaps everything."""
PENALTY = 1e4
"""Weight of a row that is not met, in units of the run's time for the whole of the row."""
LATE = 10
"""The same for the latency: memory is never exceeded to be earlier. A least throughput needs no row: time is least anyway."""
MET = 1e-6
"""Part of a row by which a solver's rounding may miss it."""


class Limits(NamedTuple):
    """Bounds of the user, in seconds; None: there is none."""

    latency: float | None = None
    run: float | None = None


NO_LIMITS = Limits()
DEMANDS = {"max_latency", "min_throughput"}
"""Names of the rows of `Limits`."""


@dataclass(frozen=True)
class Solution:
    """The best shares of a candidate.

    Attributes:
        candidate: Its integers.
        shares: Shares of weights, cache and hidden states.
        seconds: Time of the run by the closed form.
        violations: Rows that cannot be met, with the part of what there is by which they are missed.
    """

    candidate: Candidate
    shares: Mapping[What, Shares]
    seconds: float
    violations: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Formulation:
    """What the programme of a candidate needs: linear functions only."""

    candidate: Candidate
    busy: Mapping[SweepKind, Sequence[Linear]]
    counts: Mapping[SweepKind, int]
    first: Mapping[SweepKind, int]
    memory: Sequence[MemoryRow]

    @classmethod
    def of(cls, model: CostModel, candidate: Candidate) -> Formulation:
        """Evaluate cost model and memory plan for a candidate."""
        middle = model.placements.plan(candidate, mixed(candidate.weights), mixed(candidate.cache))
        sweeps = model.sweeps(candidate)
        busy = {}
        for kind in KINDS:
            each = model.busy(kind, candidate)
            busy[kind] = [*each.values(), *model.joint(each), *model.alone(kind, candidate, each)]
        cache_bytes = model.cache_bytes(candidate.live, middle.cache) if model.features.sequences else 0.0
        memory = list(memory_rows(model.placements, candidate, cache_bytes))
        return cls(candidate, busy, sweeps.counts, sweeps.first_counts, memory)

    def seconds(self, shares: Mapping[What, Shares]) -> float:
        """Return the time of a run with given shares: of each kind of sweep its number times its slowest resource."""
        return sum(self.counts[kind] * max(each.at(shares) for each in self.busy[kind]) for kind in KINDS)

    def latency(self, times: Mapping[SweepKind, object]) -> object:
        """Return the time until the first job is answered, for the times of sweeps: numbers, or variables of a solver."""
        return sum(self.first[kind] * times[kind] for kind in KINDS)  # type: ignore[operator,misc]


def solve(formulations: Sequence[Formulation], fixed: Mapping[What, Shares], limits: Limits = NO_LIMITS) -> list[Solution]:
    """Solve the programmes of all candidates.

    Args:
        formulations: Their rows.
        fixed: Shares that the user or the machine decides.
        limits: Bounds of the user.

    Raises:
        FlexGenError: If the solver cannot be run.
    """
    problem = pulp.LpProblem("policy", pulp.LpMinimize)
    parts = [_Part(problem, number, each, fixed, limits) for number, each in enumerate(formulations)]
    problem.setObjective(pulp.lpSum(part.objective for part in parts))
    try:
        status = problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1))
    except pulp.PulpSolverError as error:
        raise FlexGenError(f"The solver of PuLP does not run here ({error}). Install PuLP again, or give a policy.") from None
    assert status == pulp.LpStatusOptimal, "with every row elastic there is a solution"
    return [part.solution() for part in parts]


class _Part:
    """The programme of one candidate, with every row elastic, so that one that cannot be met spoils no other."""

    def __init__(
        self, problem: pulp.LpProblem, number: int, rows: Formulation, fixed: Mapping[What, Shares], limits: Limits
    ) -> None:
        self._rows, self._slacks = rows, dict[str, pulp.LpVariable]()
        self._problem, self._name = problem, f"c{number}"
        candidate = rows.candidate
        allowed: dict[What, Shares] = {"weights": candidate.weights, "cache": candidate.cache, "hidden": candidate.hidden}
        self._shares = {what: self._variables(what, tiers, fixed.get(what)) for what, tiers in allowed.items()}
        start = {what: fixed.get(what) or mixed(tiers) for what, tiers in allowed.items()}
        self._scale = max(rows.seconds(start), 1e-9)
        times = {kind: pulp.LpVariable(f"{self._name}_{kind}", 0) for kind in KINDS}
        total = pulp.lpSum(rows.counts[kind] * times[kind] for kind in KINDS)
        spent = []
        for kind in KINDS:
            for each in rows.busy[kind]:
                if rows.counts[kind] and (each.factors or each.constant):
                    problem += times[kind] >= self._expression(each)
                    spent.append(rows.counts[kind] * self._expression(each))
        for row in rows.memory:
            available = max(1, row.available)
            self._elastic(row.name, self._expression(row.taken * (1 / available)), row.available / available)
        if limits.latency is not None:
            self._elastic("max_latency", rows.latency(times) * (1 / limits.latency), 1)  # type: ignore[operator]
        weight = EVERY_BUSY_SECOND / self._scale
        self.objective = (
            total * (1 / self._scale)
            + weight * pulp.lpSum(spent)
            + pulp.lpSum(slack * (LATE if name in DEMANDS else PENALTY) for name, slack in self._slacks.items())
        )

    def solution(self) -> Solution:
        shares = {what: _values(variables) for what, variables in self._shares.items()}
        missed = {name: slack.value() or 0.0 for name, slack in self._slacks.items()}
        violations = {name: value for name, value in missed.items() if value > MET}
        return Solution(self._rows.candidate, shares, self._rows.seconds(shares), violations)

    def _variables(self, what: What, tiers: Shares, fixed: Shares | None) -> list[pulp.LpVariable]:
        found = []
        for tier, most, value in zip(TIERS, tiers, fixed or (None, None, None), strict=True):
            low, high = (0, most) if value is None else (value, value)
            found.append(pulp.LpVariable(f"{self._name}_{what}_{tier}", low, high))
        self._problem += pulp.lpSum(found) == 1
        return found

    def _expression(self, linear: Linear) -> pulp.LpAffineExpression:
        terms = [(self._shares[what][TIERS.index(tier)], factor) for (what, tier), factor in linear.factors.items()]
        return pulp.LpAffineExpression(terms, linear.constant)

    def _elastic(self, name: str, left: pulp.LpAffineExpression, right: float) -> None:
        slack = pulp.LpVariable(f"{self._name}_slack{len(self._slacks)}", 0)
        self._slacks[name] = slack
        self._problem += left <= right + slack


def _values(variables: Iterable[pulp.LpVariable]) -> Shares:
    values = [max(0.0, variable.value() or 0.0) for variable in variables]
    total = sum(values)
    device, host, disk = (value / total for value in values)
    return device, host, disk

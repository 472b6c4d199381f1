"""Simulation of a run: what a plan makes of a workload on a machine, sweep by sweep (FlexGen section 4.3). No torch.

Sweeps are not all replayed.

* One sweep stands for up to `flexgen_helm.policy.planner.sweeps.ALIKE` that follow each other and only decode the same
  completions. Equal sweeps take equally long.
* A sweep begins with the weights that one like it has loaded ahead; the first of a run begins with nothing.
* Of layers that repeat with a period only the first few are replayed, if the last of them take equally long: then so do all.

`tests/policy/planner` compares that with the replay of everything.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.fluid import Fluid, Mark, Span
from flexgen_helm.policy.planner.loads import SweepLoad
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.replay import Replay
from flexgen_helm.policy.planner.sweeps import sweep_loads
from flexgen_helm.policy.planner.workload import Workload

MOST_PERIOD = 4
"""Longest period of layers that is looked for."""
LEAST_LAYERS = 12
"""Fewest layers that are replayed if the others are not: weights that are loaded ahead come into step meanwhile."""
EQUAL = 1e-3
"""Largest relative difference between layers that take equally long."""


NOTHING = Mark(0.0, {}, {})


def simulate(plan: MemoryPlan, workload: Workload, profile: MachineProfile, *, exactly: bool = False) -> Prediction:
    """Predict a run.

    Args:
        plan: The memory plan; rows are packed and in column order.
        workload: What is asked.
        profile: The machine.
        exactly: Whether every sweep and layer is replayed.

    Raises:
        PolicyError: If the profile lacks a rate that the policy needs.
        OutOfSpace: If a prompt of the workload does not fit into the cache.
    """
    durations = Durations(plan, profile)
    loads = list(sweep_loads(plan, workload, **({"alike": 1} if exactly else {})))
    latency = 0.0
    total = NOTHING
    costs = _replayed(durations, loads) if exactly else _sampled(durations, loads)
    for load, cost in zip(loads, costs, strict=True):
        total = total.plus(cost, load.count)
        if not latency and load.answers:
            latency = total.seconds
    return Prediction(
        policy=replace(plan.policy, weights=plan.weights.shares),
        seconds=total.seconds,
        prompt_tokens=sum(load.prompt_tokens * load.count for load in loads),
        generated_tokens=sum(load.generated_tokens * load.count for load in loads),
        sweeps=sum(load.count for load in loads),
        peak_bytes=plan.peak_bytes,
        bytes_moved={name: round(count) for name, count in total.moved.items() if count},
        busy_seconds=total.busy,
        latency_seconds=latency,
    )


def timeline(plan: MemoryPlan, load: SweepLoad, profile: MachineProfile) -> list[Span]:
    """Return what every resource does in a sweep that follows one like it.

    Args:
        plan: The memory plan.
        load: The sweep, from `flexgen_helm.policy.planner.sweeps.sweep_loads`.
        profile: The machine.

    Returns:
        Spans in the order of their ends; the sweep begins at 0.
    """
    spans: list[Span] = []
    clock = Fluid(duplex=profile.duplex, spans=spans)
    replay = Replay(Durations(plan, profile), clock)
    begin = replay.sweep(load)
    replay.sweep(load)
    return [span._replace(begin=max(0.0, span.begin - begin), end=span.end - begin) for span in spans if span.end > begin]


def sweep_cost(durations: Durations, load: SweepLoad) -> Mark:
    """Return what a sweep takes that follows one like it.

    Args:
        durations: Stages of operations.
        load: The sweep.
    """
    return _sampled(durations, [load, load])[1]


def _replayed(durations: Durations, loads: list[SweepLoad]) -> list[Mark]:
    """Return what each sweep takes, from a replay of everything."""
    clock = Fluid(duplex=durations.profile.duplex)
    replay = Replay(durations, clock)
    return [_cost_of(replay, clock, load) for load in loads]


def _cost_of(replay: Replay, clock: Fluid, load: SweepLoad) -> Mark:
    begin = clock.mark()
    replay.sweep(load)
    return clock.mark().since(begin)


def _sampled(durations: Durations, loads: list[SweepLoad]) -> list[Mark]:
    """Return what each sweep takes, from replays of some layers of different sweeps."""
    num_layers = durations.plan.shapes.num_layers
    few = _few_layers(durations)
    known: dict[object, Mark] = {}
    costs: list[Mark] = []
    for i, load in enumerate(loads):
        first = i == 0 and bool(durations.plan.weights.streamed)
        key = first, load.rows, load.logits
        if key not in known:
            found = _one(durations, load, few, first=first) if few is not None else None
            known[key] = found or _one(durations, load, (num_layers, 1), first=first) or NOTHING
        costs.append(known[key])
    return costs


def _one(durations: Durations, load: SweepLoad, layers: tuple[int, int], *, first: bool) -> Mark | None:
    """Return what a sweep takes.

    Args:
        durations: Stages of operations.
        load: The sweep.
        layers: Layers that are replayed, and their period.
        first: Whether nothing was loaded ahead.

    Returns:
        None: layers that should take equally long do not.
    """
    num_layers, period = layers
    clock = Fluid(duplex=durations.profile.duplex)
    replay = Replay(durations, clock, num_layers=num_layers)
    if not first and durations.plan.weights.streamed:
        replay.sweep(load)
    cost = _cost_of(replay, clock, load)
    skipped = durations.plan.shapes.num_layers - num_layers
    if not skipped:
        return cost
    ends = replay.layer_ends
    last, before = ends[-1].since(ends[-1 - period]), ends[-1 - period].since(ends[-1 - 2 * period])
    if abs(last.seconds - before.seconds) > EQUAL * last.seconds:
        return None
    return cost.plus(last, skipped / period)


def _few_layers(durations: Durations) -> tuple[int, int] | None:
    """Return how many layers stand for all, and their period; None: only all of them."""
    plan = durations.plan
    shapes, tiers = plan.shapes, plan.weights.tiers
    kinds = [(tiers[j], shapes.bound_bytes[j], shapes.disk_bytes[j], shapes.products_of(j)) for j in range(shapes.num_layers)]
    for period in range(1, MOST_PERIOD + 1):
        if kinds[period:] == kinds[:-period]:
            few = shapes.num_layers % period
            few += -(-(max(LEAST_LAYERS, 4 * period) - few) // period) * period
            return (few, period) if few < shapes.num_layers else None
    return None

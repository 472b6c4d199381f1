"""Simulation of a run: what a plan makes of a workload on a machine, sweep by sweep (FlexGen section 4.3). No torch.

Sweeps are not all replayed.

* One sweep stands for up to `flexgen_helm.policy.planner.sweeps.ALIKE` that follow each other and only decode the same
  completions.
* Where only the device works, times add up. Else sweeps are alike that have as many rows of each kind and the same busiest
  resource: `SAMPLES` of these are replayed, over the whole range of that resource's time, and the ratio of the sweep's time to
  it is interpolated.
* A sweep begins with the weights that the one before it has loaded ahead, and what that still stores; the first with nothing.
* Of layers that repeat with a period only the first few are replayed, if the last of them take equally long: then so do all.

`tests/policy/planner` compares that with the replay of everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.fluid import Fluid, Mark, Span
from flexgen_helm.policy.planner.loads import SweepLoad
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.replay import Replay
from flexgen_helm.policy.planner.sweeps import ALIKE, sweep_loads
from flexgen_helm.policy.planner.totals import Totals
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.types import Tier

MOST_PERIOD = 4
"""Longest period of layers that is looked for."""
LEAST_LAYERS = 6
"""Fewest layers that are replayed if the others are not: weights that are loaded ahead come into step meanwhile."""
SAMPLES = 9
"""Most sweeps that are replayed of those that are alike."""
EQUAL = 1e-3
"""Largest relative difference between layers that take equally long."""
PAUSE = 2.0
"""Sweeps for which rows are awaited, where all is there that can be loaded ahead."""
Pause = Literal["none", "sweep", "rows"]
"""What a machine waits for, long enough for all to be loaded ahead: nothing, the next sweep, or the sweep's rows."""
NOTHING = Mark(0.0, {}, {})
"""Before anything is done."""


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
    loads = list(sweep_loads(plan, workload, alike=1 if exactly else ALIKE))
    latency = 0.0
    total = NOTHING
    costs = _replayed(durations, loads) if exactly else sampled_costs(durations, loads)
    for load, cost in zip(loads, costs, strict=True):
        total = total.plus(cost, load.count)
        if not latency and load.answers:
            latency = total.seconds
    cache = _cache_bytes(plan, loads)
    return Prediction(
        policy=replace(plan.policy, weights=plan.weights.shares),
        seconds=total.seconds,
        prompt_tokens=sum(load.prompt_tokens * load.count for load in loads),
        generated_tokens=sum(load.generated_tokens * load.count for load in loads),
        sweeps=sum(load.count for load in loads),
        peak_bytes=plan.peak_with(cache),
        running_bytes=plan.running_with(cache),
        bytes_moved={name: round(count) for name, count in total.moved.items() if count},
        busy_seconds=total.busy,
        latency_seconds=latency,
    )


def running_bytes(plan: MemoryPlan, workload: Workload) -> Mapping[Tier, int]:
    """Return `Prediction.running_bytes` alone, for which no profile is needed.

    Args:
        plan: The memory plan; rows are packed and in column order.
        workload: What is asked.
    """
    return plan.running_with(_cache_bytes(plan, list(sweep_loads(plan, workload))))


def _cache_bytes(plan: MemoryPlan, loads: Sequence[SweepLoad]) -> dict[Tier, int]:
    """Return the most bytes that K and V take on each tier."""
    return plan.cache.taken_bytes(max(sum(load.cache_bytes.values()) for load in loads))


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
    totals = Totals(durations)
    cost = totals.of(load)
    if not totals.waits(load):
        return cost._replace(seconds=cost.busy["device"])
    return cost._replace(seconds=_one(durations, load, _few_layers(durations), before=load).seconds)


def _replayed(durations: Durations, loads: list[SweepLoad]) -> list[Mark]:
    """Return what each sweep takes, from a replay of everything."""
    clock = Fluid(duplex=durations.profile.duplex)
    replay = Replay(durations, clock)
    return [_cost_of(replay, clock, load) for load in loads]


def _cost_of(replay: Replay, clock: Fluid, load: SweepLoad, *, waits: float = 0.0) -> Mark:
    """Return what a sweep takes, from when its rows arrive: after so many seconds."""
    begin = clock.mark()
    replay.sweep(load, begin=clock.now, arrivals=[clock.now + waits] * len(load.rows) if waits else ())
    cost = clock.mark().since(begin)
    return cost._replace(seconds=cost.seconds - waits)


def sampled_costs(durations: Durations, loads: list[SweepLoad], *, pause: Pause = "none") -> list[Mark]:
    """Return what each sweep takes, from replays of some.

    Args:
        durations: Stages of operations.
        loads: The sweeps, one behind the other.
        pause: What the machine waits for before each.
    """
    totals = Totals(durations)
    found = [totals.of(load) for load in loads]
    alike: dict[object, list[int]] = defaultdict(list)
    for i, load in enumerate(loads):
        if totals.waits(load):
            busiest = max(found[i].busy, key=found[i].busy.__getitem__)
            alike[busiest, tuple((row.kind, row.size) for row in load.rows)].append(i)
        else:
            before = recording_seconds(durations, load) if pause == "rows" else 0.0
            found[i] = found[i]._replace(seconds=found[i].busy["device"] - before)
    few = _few_layers(durations)
    for numbers in alike.values():
        in_order = sorted(numbers, key=lambda i: found[i].seconds)
        _stretch(partial(_one, durations, pause=pause), loads, found, in_order, few)
    if durations.plan.weights.streamed and pause != "rows":
        found[:1] = [_one(durations, load, None, before=None) for load in loads[:1]]
    return found


def recording_seconds(durations: Durations, load: SweepLoad) -> float:
    """Return how long the rows of a sweep are recorded."""
    return sum(stage.seconds for row in load.rows for stage in durations.record(row))


def _stretch(
    one: Callable[..., Mark], loads: list[SweepLoad], found: list[Mark], numbers: list[int], few: tuple[int, int] | None
) -> None:
    """Replay some of the sweeps that are alike, and make the others as much longer than their busiest resource needs.

    Args:
        one: `_one` of the plan.
        loads: All sweeps.
        found: Their totals, which get their time.
        numbers: Sweeps that are alike, by the time of their busiest resource.
        few: See `_few_layers`.
    """
    last = len(numbers) - 1
    chosen = sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
    ratios = {}
    replayed: dict[object, float] = {}  # by all that a replay depends on: sweeps of equal jobs are often equal
    for place in chosen:
        i = numbers[place]
        before = loads[i - 1] if i and loads[i].count == 1 else loads[i]
        sweep = before.rows, before.logits, loads[i].rows, loads[i].logits
        if sweep not in replayed:
            replayed[sweep] = one(loads[i], few, before=before).seconds
        ratios[place] = replayed[sweep] / found[i].seconds
    below = 0
    for place, i in enumerate(numbers):
        above = next(each for each in chosen if each >= place)
        below = place if place == above else below
        share = (place - below) / (above - below) if above > below else 0.0
        ratio = (1 - share) * ratios[below] + share * ratios[above]
        found[i] = found[i]._replace(seconds=ratio * found[i].seconds)


def _one(
    durations: Durations, load: SweepLoad, few: tuple[int, int] | None, *, before: SweepLoad | None, pause: Pause = "none"
) -> Mark:
    """Return what a sweep takes.

    Args:
        durations: Stages of operations.
        load: The sweep.
        few: Layers that are replayed, and their period; None: all, as also if the last of these do not take equally long.
        before: The sweep before it, which loads ahead; None: there is none.
        pause: What the machine waits for behind that.
    """
    num_layers, period = few or (durations.plan.shapes.num_layers, 0)
    clock = Fluid(duplex=durations.profile.duplex)
    replay = Replay(durations, clock, num_layers=num_layers)
    if before is not None:
        replay.sweep(before)
    if pause != "none":
        clock.run_out()
    cost = _cost_of(replay, clock, load, waits=PAUSE * clock.now if pause == "rows" else 0.0)
    skipped = durations.plan.shapes.num_layers - num_layers
    if not skipped:
        return cost
    ends = replay.layer_ends
    last, other = ends[-1].since(ends[-1 - period]), ends[-1 - period].since(ends[-1 - 2 * period])
    if abs(last.seconds - other.seconds) > EQUAL * last.seconds:
        return _one(durations, load, None, before=before, pause=pause)
    return cost.plus(last, skipped / period)


def _few_layers(durations: Durations) -> tuple[int, int] | None:
    """Return how many layers stand for all, and their period; None: only all of them."""
    plan = durations.plan
    shapes, tiers = plan.shapes, plan.weights.tiers
    kinds = [(tiers[j], shapes.bound_bytes[j], shapes.disk_bytes[j], shapes.products_of(j)) for j in range(shapes.num_layers)]
    for period in range(1, MOST_PERIOD + 1):
        if kinds[period:] == kinds[:-period]:
            few = shapes.num_layers % period
            few += -(-(max(LEAST_LAYERS + plan.policy.prefetch, 4 * period) - few) // period) * period
            return (few, period) if few < shapes.num_layers else None
    return None

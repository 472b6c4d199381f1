"""Prediction of a run on a pipeline: time, bytes, what each stage does, and what binds. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from flexgen_helm.policy.planner.fluid import Mark
from flexgen_helm.policy.planner.pipeline.divided import Stages
from flexgen_helm.policy.planner.pipeline.lanes import LaneSweeps
from flexgen_helm.policy.planner.pipeline.network import NO_NETWORK, Network
from flexgen_helm.policy.planner.pipeline.walk import Costs, Course, ReplayedStage, SampledStage, Stage, walk
from flexgen_helm.policy.planner.sweeps import ALIKE
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.types import ResolvedPolicy, Tier

WORTH = 0.02
"""Part of a run's time that must be lost to the network for it to bind: the first and the last sweeps always wait for it."""


@dataclass(frozen=True)
class StagePrediction:
    """What a stage does in a run.

    Attributes:
        layers: Its layers.
        busy_seconds: Time in which each of its resources is busy.
        bytes_moved: Bytes over each of its links.
        bytes_sent: Bytes that it sends to the next stage; of the last one to the first.
        peak_bytes: Most bytes of each tier, with the cache that is used.
    """

    layers: range
    busy_seconds: Mapping[str, float]
    bytes_moved: Mapping[str, int]
    bytes_sent: int
    peak_bytes: Mapping[Tier, int]

    @property
    def binding(self) -> str:
        """Resource that is busy longest."""
        return max(self.busy_seconds, key=self.busy_seconds.__getitem__, default="none")

    @property
    def busiest_seconds(self) -> float:
        """How long that is."""
        return max(self.busy_seconds.values(), default=0.0)


@dataclass(frozen=True)
class PipelinePrediction:
    """What a run on a pipeline is expected to take.

    Attributes:
        policy: The policy of all stages.
        lanes: Sweeps that are in flight.
        network: What lies between the stages.
        seconds: Time of the run, loading not counted.
        latency_seconds: Time until the first job is answered.
        prompt_tokens: Prompt tokens that are computed.
        generated_tokens: New tokens.
        sweeps: Number of sweeps.
        stages: What each stage does.
        without_latency: Time of the run if the network had no latency.
        without_rate: Time of the run if its rate were unlimited.
        without_network: Time of the run with neither.
    """

    policy: ResolvedPolicy
    lanes: int
    network: Network
    seconds: float
    latency_seconds: float
    prompt_tokens: int
    generated_tokens: int
    sweeps: int
    stages: tuple[StagePrediction, ...]
    without_latency: float
    without_rate: float
    without_network: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second; where none are generated, prompt tokens per second."""
        return (self.generated_tokens or self.prompt_tokens) / self.seconds if self.seconds else 0.0

    @property
    def slowest(self) -> int:
        """The stage whose busiest resource is busy longest."""
        return max(range(len(self.stages)), key=lambda s: self.stages[s].busiest_seconds)

    @property
    def utilisation(self) -> tuple[float, ...]:
        """Share of the run in which each stage's busiest resource is busy."""
        return tuple(stage.busiest_seconds / self.seconds if self.seconds else 0.0 for stage in self.stages)

    @property
    def binding(self) -> str:
        """What limits the run.

        The network, if the run were shorter by more than `WORTH` without it: its latency or its rate, whichever costs more.
        Otherwise too few lanes, if stages wait for each other; otherwise a resource of the slowest stage.
        """
        if self.seconds - self.without_network > WORTH * self.seconds:
            return "network latency" if self.without_latency <= self.without_rate else "network rate"
        if self.lanes < len(self.stages):
            return "lanes"
        return f"stage {self.slowest} {self.stages[self.slowest].binding}"


def simulate_pipeline(stages: Stages, workload: Workload, network: Network, *, exactly: bool = False) -> PipelinePrediction:
    """Predict a run on a pipeline.

    Args:
        stages: The stages.
        workload: What is asked.
        network: What lies between two stages.
        exactly: Whether every sweep and layer is replayed.

    Raises:
        PolicyError: If the profile lacks a rate that the policy needs.
        OutOfSpace: If a prompt of the workload does not fit into the cache of a lane.
    """
    sweeps = LaneSweeps.of(stages, workload, alike=1 if exactly else ALIKE)
    make = _maker(stages, sweeps, exactly=exactly)
    row_bytes = stages.shapes.hidden_size * stages.shapes.itemsize

    def run(network: Network) -> tuple[Course, list[Mark]]:
        clocks = make()
        return walk(clocks, sweeps, network, row_bytes), [clock.total for clock in clocks]

    course, totals = run(network)
    without_latency, without_rate, without_network = (
        course.seconds if each == network or len(stages.plans) == 1 else run(each)[0].seconds
        for each in (replace(network, latency=0.0), replace(network, rate=NO_NETWORK.rate), NO_NETWORK)
    )
    loads = [sweeps.loads[number] for _, number in sweeps.order]
    return PipelinePrediction(
        policy=stages.plans[0].policy,
        lanes=stages.lanes,
        network=network,
        seconds=course.seconds,
        latency_seconds=course.latency_seconds,
        prompt_tokens=sum(load.prompt_tokens for load in loads),
        generated_tokens=sum(load.generated_tokens for load in loads),
        sweeps=len(loads),
        stages=tuple(_stage(stages, sweeps, s, total, course.hop_bytes[s]) for s, total in enumerate(totals)),
        without_latency=without_latency,
        without_rate=without_rate,
        without_network=without_network,
    )


def _maker(stages: Stages, sweeps: LaneSweeps, *, exactly: bool) -> Callable[[], list[Stage]]:
    """Return what makes stages that have done nothing yet."""
    if exactly:
        parts = [partial(ReplayedStage, durations, sweeps.loads) for durations in stages.durations]
        return lambda: [part() for part in parts]
    costs: list[Costs] = []
    for s, plan in enumerate(stages.plans):
        alike = [i for i in range(s) if stages.plans[i] == plan]
        if alike and alike[-1]:
            costs.append(costs[alike[-1]])
            continue
        behind = costs[0].behind if alike else None  # to the first stage no rows come, so only what waits for none is shared
        costs.append(Costs(stages.durations[s], sweeps.loads, is_first=s == 0, behind=behind))
    return lambda: [SampledStage(each) for each in costs]


def _stage(stages: Stages, sweeps: LaneSweeps, s: int, total: Mark, sent: float) -> StagePrediction:
    plan = stages.plans[s]
    held = max(sum(load.cache_bytes.values()) for load in sweeps.loads) * stages.lanes  # each lane has pages of its own
    cache = plan.cache.taken_bytes(held * plan.shapes.num_layers / stages.plans[0].shapes.num_layers)
    return StagePrediction(
        layers=stages.ranges[s],
        busy_seconds={name: seconds for name, seconds in total.busy.items() if seconds},
        bytes_moved={name: round(count) for name, count in total.moved.items() if count},
        bytes_sent=round(sent),
        peak_bytes=plan.peak_with(cache),
    )

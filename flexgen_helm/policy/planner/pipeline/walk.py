"""The way of sweeps through the stages of a pipeline, over the network between them. No torch.

Every stage handles sweeps in one order, one at a time. A row leaves a stage when the stage's last layer has computed it, and
travels while the next row is computed. The stage behind begins its first layer for a row when it has arrived. The last stage
answers, and the first one plans the lane's next sweep when the answers have arrived.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.durations import Stage as DurationStage
from flexgen_helm.policy.planner.fluid import Fluid, Mark
from flexgen_helm.policy.planner.loads import RowLoad, SweepLoad
from flexgen_helm.policy.planner.pipeline.lanes import LaneSweeps
from flexgen_helm.policy.planner.pipeline.network import Network
from flexgen_helm.policy.planner.replay import Replay
from flexgen_helm.policy.planner.simulate import recording_seconds, sampled_costs

ANSWER_BYTES = 16
"""Bytes of a chosen token and its log-probability."""


class Passed(NamedTuple):
    """A sweep that a stage has done.

    Attributes:
        end: When it was done.
        row_ends: When each row had gone through the stage's last layer.
    """

    end: float
    row_ends: Sequence[float]


class Stage(Protocol):
    """A stage on a clock."""

    def sweep(self, number: int, begin: float, arrivals: Sequence[float]) -> Passed:
        """Do a sweep behind the one before it.

        Args:
            number: Number of its load.
            begin: When the stage knows its rows.
            arrivals: When each row arrives; none: it is the first stage.
        """

    @property
    def total(self) -> Mark:
        """What its resources have done."""


@dataclass
class Course:
    """How a run went.

    Attributes:
        seconds: Until the last answer was there.
        latency_seconds: Until the first job was answered.
        hop_bytes: Bytes that each stage has sent.
    """

    seconds: float = 0.0
    latency_seconds: float = 0.0
    hop_bytes: list[float] = field(default_factory=list)


def walk(stages: Sequence[Stage], sweeps: LaneSweeps, network: Network, row_bytes: int) -> Course:
    """Let all sweeps go through all stages.

    Args:
        stages: The stages, of which none has done anything.
        sweeps: What the lanes do.
        network: What lies between two stages, and between the last and the first.
        row_bytes: Bytes of the hidden state of one token.
    """
    course = Course(hop_bytes=[0.0] * len(stages))
    free, answered, planned = [0.0] * len(stages), dict.fromkeys(range(len(sweeps.order)), 0.0), 0.0
    for lane, number in sweeps.order:
        load = sweeps.loads[number]
        begin = max(answered[lane], planned)
        arrivals: list[float] = []
        for s, stage in enumerate(stages):
            passed = stage.sweep(number, begin + (network.latency if s else 0.0), arrivals)
            planned = passed.end if s == 0 else planned
            if s < len(stages) - 1:
                arrivals = []
                for row, end in zip(load.rows, passed.row_ends, strict=True):
                    free[s] = max(free[s], end) + network.seconds(row.size * row_bytes)
                    arrivals.append(free[s] + network.latency)
                    course.hop_bytes[s] += row.size * row_bytes
        course.seconds = passed.end
        if len(stages) > 1:
            count = load.logits * ANSWER_BYTES
            course.seconds += network.seconds(count) + network.latency
            course.hop_bytes[-1] += count
        answered[lane] = course.seconds
        if load.answers and not course.latency_seconds:
            course.latency_seconds = course.seconds
    return course


class ReplayedStage:
    """A stage whose every operation is replayed."""

    def __init__(self, durations: Durations, loads: Sequence[SweepLoad]) -> None:
        """Begin with nothing loaded.

        Args:
            durations: Stages of operations.
            loads: Loads by their number.
        """
        self._clock = Fluid(duplex=durations.profile.duplex)
        self._replay, self._loads = Replay(durations, self._clock), loads

    def sweep(self, number: int, begin: float, arrivals: Sequence[float]) -> Passed:
        """See `Stage`."""
        end = self._replay.sweep(self._loads[number], begin=begin, arrivals=arrivals)
        return Passed(end, self._replay.row_ends)

    @property
    def total(self) -> Mark:
        """See `Stage`."""
        return self._clock.mark()


class Costs:
    """What a stage needs for each load.

    Attributes:
        behind: A sweep right behind another one. For the first load, one before which nothing is loaded.
        first: Seconds of each row in the first layer, and in all rows' recording before it.
        last: Seconds of each row in the last layer, and of the output head behind it.
    """

    def __init__(
        self, durations: Durations, loads: Sequence[SweepLoad], *, is_first: bool, behind: list[Mark] | None = None
    ) -> None:
        """Replay some of the sweeps.

        Args:
            durations: Stages of operations.
            loads: The sweeps, one behind the other.
            is_first: Whether rows come from no stage before.
            behind: `behind` of a stage with the same plan; None: there is none.
        """
        self._durations, self._loads, self._is_first = durations, list(loads), is_first
        self.behind = behind or sampled_costs(durations, self._loads)
        last = durations.plan.shapes.num_layers - 1
        self.first = [(_in_layer(durations, 0, load.rows), recording_seconds(durations, load)) for load in self._loads]
        heads = [durations.finish(load.logits)[0].seconds for load in self._loads]
        rows = [_in_layer(durations, last, load.rows) for load in self._loads]
        self.last = list(zip(rows, heads, strict=True))

    @cached_property
    def eased(self) -> list[Mark]:
        """A sweep before which all is loaded that can be; if rows come from a stage before, since they have arrived.

        Replayed when it is first asked for: a stage that never waits does not need it.
        """
        return sampled_costs(self._durations, self._loads, pause="sweep" if self._is_first else "rows")


def _in_layer(durations: Durations, j: int, rows: Sequence[RowLoad]) -> list[float]:
    """Return how long each row occupies a layer: device, CPU that attends and what moves K and V work on different rows."""
    found = []
    for k, row in enumerate(rows):
        calls = durations.layer(j, row, first=k == 0)
        on_device = sum(stage.seconds for stage in calls if stage.resource == "device")
        moved = sum(_moving_seconds(pieces) for pieces in (durations.load_cache(row), durations.store_cache(row)))
        found.append(max(on_device, sum(stage.seconds for stage in calls) - on_device, moved))
    return found


def _moving_seconds(pieces: Sequence[Sequence[DurationStage]]) -> float:
    """Return how long the slowest of the links is busy over which pieces go."""
    busy: dict[str, float] = defaultdict(float)
    for piece in pieces:
        for stage in piece:
            busy[stage.resource] += stage.seconds
    return max(busy.values(), default=0.0)


class SampledStage:
    """A stage whose sweeps take the time of sampled ones; rows that arrive late delay the first layer."""

    def __init__(self, costs: Costs) -> None:
        """Begin with nothing loaded.

        Args:
            costs: What it needs for each load.
        """
        self._costs = costs
        self._end: float | None = None
        self._counts = [0] * len(costs.behind)

    def sweep(self, number: int, begin: float, arrivals: Sequence[float]) -> Passed:
        """See `Stage`."""
        costs, behind = self._costs, self._costs.behind[number].seconds
        self._counts[number] += 1
        before = begin if self._end is None else self._end
        start = max(before, begin)
        if arrivals:
            in_first, recording = costs.first[number]
            now = start + recording
            for arrival, seconds in zip(arrivals, in_first, strict=True):
                now = max(now, arrival) + seconds
            start = now - sum(in_first)  # as if all rows had come at once
        self._end = before + behind
        if start > before:
            self._end = max(self._end, start + min(behind, costs.eased[number].seconds))
        in_last, head = costs.last[number]
        ends, end = [], self._end - head
        for seconds in reversed(in_last):
            ends.append(end)
            end -= seconds
        return Passed(self._end, ends[::-1])

    @property
    def total(self) -> Mark:
        """See `Stage`."""
        total = Mark(0.0, {}, {})
        for count, cost in zip(self._counts, self._costs.behind, strict=True):
            total = total.plus(cost, count)
        return total

"""Predicted and measured time and memory of one policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexgen_helm import Engine
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.runs.policy_validation.cases import Case
from flexgen_helm.runs.policy_validation.peaks import Peaks
from flexgen_helm.runs.policy_validation.rates import Bench, difference, middle, sharing
from flexgen_helm.runtime.planning.automatic import known_workload
from flexgen_helm.types import Job, Tier

TRIES = 3
STEADY = 0.1
"""Most by which the binding rates may differ before and after a run that counts, and layers' time from their processor time."""
BY_PROCESSOR = ("device", "cpu_attention", "unpack")
"""Resources whose busy seconds are processor time on a CPU."""


@dataclass(frozen=True)
class Outcome:
    """One line of the table.

    Attributes:
        name: The policy.
        predicted_seconds: By the clock on the wall, with the machine's rates around the run.
        measured_seconds: The same, measured.
        predicted_processor: Processor time in seconds; 0 on a GPU.
        measured_processor: The same, measured; of all threads of the process.
        binding: Resource that is predicted to be busy longest.
        predicted_busy: Seconds of each resource, by the clock on the wall.
        measured_busy: The same, measured.
        predicted_peaks: Most bytes of each tier while the jobs run.
        measured_peaks: The same, measured in a process that did nothing else.
        discarded: Runs that do not count because the machine changed meanwhile.
        steady: Whether the last one counts. Otherwise its processor time does.
    """

    name: str
    predicted_seconds: float
    measured_seconds: float
    predicted_processor: float
    measured_processor: float
    binding: str
    predicted_busy: Mapping[str, float]
    measured_busy: Mapping[str, float]
    predicted_peaks: Mapping[Tier, int]
    measured_peaks: Mapping[Tier, int]
    discarded: int
    steady: bool

    @property
    def peaks(self) -> Peaks:
        """Predicted and measured peaks."""
        return Peaks(dict(self.predicted_peaks), dict(self.measured_peaks))

    @property
    def decisive(self) -> tuple[float, float]:
        """Predicted and measured seconds that are compared."""
        if self.steady or not self.predicted_processor:
            return self.predicted_seconds, self.measured_seconds
        return self.predicted_processor, self.measured_processor

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        predicted, measured = self.decisive
        return predicted / measured - 1


def measure(engine: Engine, case: Case, jobs: Sequence[Job], bench: Bench, peaks: Peaks, *, tries: int = TRIES) -> Outcome:
    """Run the jobs of a case until the machine was steady meanwhile, and predict the run from its rates around it.

    Args:
        engine: An engine with the case's policy.
        case: The case.
        jobs: Its jobs.
        bench: Measures rates.
        peaks: Peaks of memory in a process that did nothing else.
        tries: Most runs.
    """
    plan, form = engine._parts.plan, engine._parts.plan.shapes.weight_format
    workload = known_workload(bench.source, jobs)
    assert workload is not None
    expected = simulate(plan, workload, bench.base)
    used = [name for name, seconds in expected.busy_seconds.items() if seconds]
    before, discarded = bench.profile(engine.policy, form, used), 0
    while True:
        begun = time.process_time()
        engine.run(jobs, progress=False)
        processor = time.process_time() - begun
        after = bench.profile(engine.policy, form, used)
        changed = difference(before, after, expected.binding)
        steady = max(changed, sharing(before), sharing(after)) <= STEADY
        discarded += not steady
        if steady or discarded == tries:
            break
        before = after
    around = middle(before, after)
    made, stats = simulate(plan, workload, around), engine.stats
    by_processor = None if bench.device.is_gpu else simulate(plan, workload, around.by_processor_time())
    return Outcome(
        name=case.name,
        predicted_seconds=made.seconds,
        measured_seconds=stats.seconds,
        predicted_processor=0.0 if by_processor is None else processor_seconds(by_processor),
        measured_processor=processor,
        binding=made.binding,
        predicted_busy=made.busy_seconds,
        measured_busy=stats.busy_seconds,
        predicted_peaks=peaks.predicted,
        measured_peaks=peaks.measured,
        discarded=discarded,
        steady=steady,
    )


def processor_seconds(made: Prediction) -> float:
    """Return the processor time of a run that was predicted with a profile of processor times, by all threads."""
    return sum(made.busy_seconds.get(name, 0.0) for name in BY_PROCESSOR)

"""Predicted and measured time and memory of one policy."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import mean

from flexgen_helm import Engine
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.runs.policy_validation.peaks import Peaks
from flexgen_helm.runs.policy_validation.rates import Bench, difference, middle, sharing
from flexgen_helm.runtime.planning.automatic import known_workload
from flexgen_helm.types import Job, Tier

RUNS = 3
"""Runs that count: the rates of a virtual machine move by a tenth within a run."""
TRIES = 3
STEADY = 0.1
"""Most by which the binding rates may differ before and after a run that counts, and layers' time from their processor time."""
BY_PROCESSOR = ("device", "cpu_attention", "unpack")
"""Resources whose busy seconds are processor time on a CPU."""


@dataclass(frozen=True)
class Outcome:
    """One line of the table: means of the runs that count.

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
        steady: Whether any counts. Otherwise the processor time of all does.
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


@dataclass(frozen=True)
class Run:
    """One run and what it was predicted to be, with the machine's rates around it.

    Attributes:
        predicted: By the clock on the wall.
        predicted_processor: Processor time in seconds; 0 on a GPU.
        measured_seconds: By the clock on the wall.
        measured_processor: Processor time in seconds.
        measured_busy: Seconds of each resource.
        steady: Whether the rates that bind it are the same before and after, and nothing else worked on the machine.
    """

    predicted: Prediction
    predicted_processor: float
    measured_seconds: float
    measured_processor: float
    measured_busy: Mapping[str, float]
    steady: bool


def measure(engine: Engine, jobs: Sequence[Job], bench: Bench, *, runs: int = RUNS, tries: int = TRIES) -> list[Run]:
    """Run jobs until some runs count, and predict each run from the machine's rates around it.

    Args:
        engine: An engine with the policy.
        jobs: Its jobs.
        bench: Measures rates.
        runs: Runs that count, if the machine is steady.
        tries: Most runs for each of these.
    """
    found: list[Run] = []
    gc.collect()
    gc.freeze()  # a collection of what the libraries hold takes a quarter of a second, once in a while
    for run in islice(_runs(engine, jobs, bench), runs * tries):
        found.append(run)
        if sum(each.steady for each in found) == runs:
            break
    gc.unfreeze()
    return found


def outcome_of(name: str, runs: Sequence[Run], peaks: Peaks) -> Outcome:
    """Return the line of a policy.

    Args:
        name: Its name.
        runs: Its runs.
        peaks: Peaks of memory in a process that did nothing else.
    """
    counted = [run for run in runs if run.steady] or runs
    return Outcome(
        name=name,
        predicted_seconds=mean(run.predicted.seconds for run in counted),
        measured_seconds=mean(run.measured_seconds for run in counted),
        predicted_processor=mean(run.predicted_processor for run in counted),
        measured_processor=mean(run.measured_processor for run in counted),
        binding=counted[0].predicted.binding,
        predicted_busy=_mean_busy([run.predicted.busy_seconds for run in counted]),
        measured_busy=_mean_busy([run.measured_busy for run in counted]),
        predicted_peaks=peaks.predicted,
        measured_peaks=peaks.measured,
        discarded=sum(not run.steady for run in runs),
        steady=any(run.steady for run in runs),
    )


def _runs(engine: Engine, jobs: Sequence[Job], bench: Bench) -> Iterator[Run]:
    """Run jobs again and again; the rates behind one run are those before the next."""
    plan = engine._parts.plan
    workload = known_workload(bench.source, jobs)
    assert workload is not None
    expected = simulate(plan, workload, bench.base)
    used = [name for name, seconds in expected.busy_seconds.items() if seconds]
    before = bench.profile(plan, used)
    while True:
        begun = time.process_time()
        engine.run(jobs, progress=False)
        processor, stats = time.process_time() - begun, engine.stats
        after = bench.profile(plan, used)
        around = middle(before, after)
        changed = max(difference(before, after, expected.binding), sharing(before), sharing(after))
        predicted_processor = 0.0
        if not bench.device.is_gpu:
            predicted_processor = processor_seconds(simulate(plan, workload, around.by_processor_time()))
        predicted = simulate(plan, workload, around)
        yield Run(predicted, predicted_processor, stats.seconds, processor, stats.busy_seconds, changed <= STEADY)
        before = after


def _mean_busy(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: mean(each.get(name, 0.0) for each in found) for name in {name: None for each in found for name in each}}


def processor_seconds(made: Prediction) -> float:
    """Return the processor time of a run that was predicted with a profile of processor times, by all threads."""
    return sum(made.busy_seconds.get(name, 0.0) for name in BY_PROCESSOR)

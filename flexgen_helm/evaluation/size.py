"""What a suite asks of a model, and how long that takes on a machine: counted and predicted, without running anything."""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helm.benchmark.run_spec import RunSpec
from helm.common.request import Request

from flexgen_helm.compression.config import with_variant
from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.commands import Evaluation
from flexgen_helm.evaluation.in_process import logged, runner_of
from flexgen_helm.evaluation.preparation import prepare
from flexgen_helm.generation.prepare import PreparedJob
from flexgen_helm.generation.prepare import prepare as prepare_job
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.deployment import named_model
from flexgen_helm.helm.requests import to_job
from flexgen_helm.loading.source import ModelSource, open_without_weights
from flexgen_helm.memory.device import Device
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.choose import Problem, choose_policy
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.reports.runs import without_model
from flexgen_helm.runtime.planning.automatic import workload_of
from flexgen_helm.runtime.planning.command import Stage, planned_shapes, stage_of

Say = Callable[[str], None]
MOST_REASON = 300
"""Characters of a reason that are repeated."""


@dataclass(frozen=True)
class Size:
    """What is asked, and what it takes."""

    requests: int
    prompt_tokens_asked: int
    """Of all requests."""
    prompt_tokens_computed: int
    """Where shared prefixes are computed once."""
    new_tokens: int
    """At most: an answer may end before."""
    hours: float
    """Predicted for answers as long as they may be, loading not counted."""


@dataclass(frozen=True)
class EntrySize:
    """One run of a suite."""

    run: str
    size: Size | None
    """As if it ran alone under the suite's policy; None: it is not known."""
    reason: str = ""
    """Why it is not known."""


@dataclass(frozen=True)
class SuiteSize:
    """A suite: its runs, and all of them as one workload."""

    entries: Sequence[EntrySize]
    size: Size | None
    """Of the runs whose size is known; None: there are none."""
    machine: str
    """Name of the machine for which hours are predicted."""


def suite_size(evaluation: Evaluation, options: Namespace, say: Say) -> SuiteSize:
    """Count what an evaluation asks, and predict how long it takes.

    Args:
        evaluation: The model and the suite.
        options: Of the machine: ``machine``, ``device``, ``dtype`` and ``max_memory``, as for ``flexgen-helm plan``.
        say: Told what happens, a line at a time.

    Raises:
        FlexGenError: The model, the machine or the data cannot be had, or no policy fits.
    """
    named = named_model(evaluation.arguments)
    say(f"{evaluation.suite.name}: reading the data of {evaluation.suite.num_entries} run entries")
    found = list(_collect(evaluation))

    def opened(name: str, dtype: str, device: Device) -> ModelSource:
        return open_without_weights(name, dtype=dtype, device=device.torch_device, revision=named.revision)

    asked = {"model": with_variant(named.name_or_path, named.compression), "config": None, "policy": None}
    stage = stage_of(Namespace(**{**vars(options), **asked}), say, opened=opened)
    jobs = {run: _prepared(requests, stage.source) for run, requests, _ in found if requests}
    whole = [job for each in jobs.values() for job in each]
    if not whole:
        return SuiteSize([EntrySize(run, None, reason) for run, _, reason in found], None, stage.profile.name)
    say(f"{evaluation.suite.name}: planning {len(whole):,} requests")
    predict, total = _planned(stage, whole)
    entries = [EntrySize(run, predict(jobs[run]) if jobs.get(run) else None, reason) for run, _, reason in found]
    return SuiteSize(entries, total, stage.profile.name)


def _planned(stage: Stage, jobs: Sequence[PreparedJob]) -> tuple[Callable[[Sequence[PreparedJob]], Size], Size]:
    """Choose the policy for all jobs; returns the function that predicts a part of them under it, and the size of all."""
    shapes = planned_shapes(stage.source, stage.compression)
    problem = Problem.of(shapes, workload_of(jobs), stage.profile, stage.space)
    choice = choose_policy(problem)
    plan = MemoryPlan.of(shapes, choice.policy, stage.space)

    def predict(part: Sequence[PreparedJob]) -> Size:
        return _size(part, simulate(plan, workload_of(part), stage.profile))

    return predict, _size(jobs, choice.prediction)


def _size(jobs: Sequence[PreparedJob], made: Prediction) -> Size:
    return Size(
        requests=len(jobs),
        prompt_tokens_asked=sum(len(job.input_ids) for job in jobs),
        prompt_tokens_computed=made.prompt_tokens,
        new_tokens=sum(job.job.max_new_tokens * job.job.num_completions for job in jobs),
        hours=made.seconds / 3600,
    )


def _prepared(requests: Sequence[Request], source: ModelSource) -> list[PreparedJob]:
    """Return the requests as the engine takes them.

    Raises:
        InvalidJob: One cannot be served.
    """
    model = source.described(source.empty)
    return [
        prepare_job(to_job(each), tokenizer=model.tokenizer, max_length=model.max_length, vocab_size=model.vocab_size)
        for each in requests
    ]


def _collect(evaluation: Evaluation) -> Iterator[tuple[str, list[Request], str]]:
    """Yield each run of a suite: its name, its requests, and why there are none."""
    prepare(evaluation)
    log = evaluation.new_log()
    with tempfile.TemporaryDirectory() as folder, logged(log, evaluation, verbose=False), _processes_print_to(log):
        runner, run_specs = runner_of(evaluation, Console(None))

        def requests(run_spec: RunSpec) -> tuple[list[Request], str]:
            try:
                return runner.requests_of(run_spec, Path(folder)), ""
            except Exception as error:  # of whatever a scenario calls
                return [], _reason(error)

        found = [(without_model(run_spec.name), *requests(run_spec)) for run_spec in run_specs]
    yield from found


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, FlexGenError) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".split())
    return text if len(text) <= MOST_REASON else f"{text[:MOST_REASON]}..."


@contextmanager
def _processes_print_to(log: Path) -> Iterator[None]:
    """Let processes that are started, such as downloads of HELM, print to a file."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with log.open("ab") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)

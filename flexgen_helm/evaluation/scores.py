"""The scores and the work of an evaluation, from the files that ``helm-run`` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flexgen_helm.errors import CorruptFile
from flexgen_helm.evaluation.commands import Evaluation
from flexgen_helm.reports.contents import Workload
from flexgen_helm.reports.main_metrics import MainMetric, MainMetrics
from flexgen_helm.reports.runs import Run, Version, list_runs, read_workloads


@dataclass(frozen=True)
class Score:
    """The main score of one run entry, and how much was asked for it."""

    run: str
    metric: str | None
    """None where neither a schema nor the scenario names a main metric."""
    value: float | None
    """Mean over the instances; None if nothing of the metric's split was evaluated."""
    instances: int
    requests: int
    prompt_tokens: int
    folder: Path = field(default=Path(), compare=False)
    """Folder of the run."""


@dataclass(frozen=True)
class Work:
    """The work of the engine for all run entries together."""

    requests: int
    answered_before: int
    """From HELM's cache or an earlier command's journal."""
    seconds: float
    prompt_tokens_asked: int
    prompt_tokens_computed: int
    bound_by: str | None = None
    """The kind of work that took most of the time."""
    what_would_help: str | None = None

    @property
    def requests_per_second(self) -> float | None:
        """Rate of the requests that were computed; None if there were none."""
        return (self.requests - self.answered_before) / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Before:
    """What was in a suite's folder before a command: the rest is this command's, whatever the clock says, which may be set."""

    runs: Mapping[Path, Version] = field(default_factory=dict)
    """Complete runs by their folder."""
    workloads: Sequence[Workload] = ()

    @classmethod
    def of(cls, suite_folder: Path) -> Before:
        """Read it; a record that is damaged is written anew, so that nothing of it is kept."""
        workloads: Sequence[Workload] = ()
        with suppress(CorruptFile):
            workloads = read_workloads(suite_folder)
        return cls({run.folder: run.version for run in list_runs(suite_folder) if run.is_complete}, workloads)


def read_scores(evaluation: Evaluation, before: Before) -> list[Score]:
    """Read the main metric of every run of the evaluation's model that HELM has written.

    Args:
        evaluation: Names the folder, and the schema that names metrics first.
        before: Runs that belong to other commands.

    Raises:
        CorruptFile: A file of a complete run cannot be read.
    """
    metrics = MainMetrics.read(evaluation.suite.schema)
    return [
        _read_score(run, metrics.find(run))
        for run in list_runs(evaluation.suite_folder)
        if run.is_complete and run.version != before.runs.get(run.folder) and run.deployment == evaluation.deployment
    ]


def _read_score(run: Run, main: MainMetric) -> Score:
    requests = run.requests()
    # Inputs as they are; HELM adds perturbed ones and the worst of them, and statistics of nothing.
    stats = [stat for stat in run.stats() if stat.perturbation is None and stat.count]
    return Score(
        run=run.scenario,
        metric=main.name,
        value=next((stat.mean for stat in stats if (stat.name, stat.split) == (main.name, main.split)), None),
        instances=len({request.instance_id for request in requests if main.split in (None, request.split)}),
        requests=len(requests),
        prompt_tokens=round(_mean_prompt_tokens(run) * len(requests)),
        folder=run.folder,
    )


def _mean_prompt_tokens(run: Run) -> float:
    stats = [stat for instance in run.instance_stats() for stat in instance.stats if stat.name == "num_prompt_tokens"]
    return sum(stat.sum for stat in stats) / max(sum(stat.count for stat in stats), 1)


def read_work(evaluation: Evaluation, before: Before) -> Work | None:
    """Read what the runner recorded in the suite's folder; None if it served nothing.

    Args:
        evaluation: Names the folder and the deployment.
        before: Records of other commands.

    Raises:
        CorruptFile: The record cannot be read.
    """
    workloads = read_workloads(evaluation.suite_folder)
    served = [one for one in workloads if one.deployment == evaluation.deployment and one not in before.workloads]
    if not served:
        return None
    measured = [one.measured for one in served if one.measured is not None]
    stats = [one["stats"] for one in measured]
    return Work(
        requests=sum(one.num_requests for one in served),
        answered_before=sum(one.num_cached + one.num_resumed for one in served),
        seconds=sum(one["seconds"] for one in stats),
        prompt_tokens_asked=sum(one["prompt_tokens_asked"] for one in stats),
        prompt_tokens_computed=sum(one["prompt_tokens_computed"] for one in stats),
        bound_by=measured[-1]["bound_by"] if measured else None,
        what_would_help=measured[-1]["what_would_help"] if measured else None,
    )

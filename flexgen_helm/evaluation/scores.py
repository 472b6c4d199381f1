"""Reads what ``helm-run`` wrote."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from helm.benchmark.presentation.schema import get_default_schema_path
from helm.benchmark.scenarios.scenario import ScenarioSpec, create_scenario

from flexgen_helm.evaluation.commands import Evaluation
from flexgen_helm.helm.run_record import WORKLOAD_FILE
from flexgen_helm.reports.schema import read_environments


@dataclass(frozen=True)
class Score:
    """What one run entry reached."""

    run: str
    metric: str | None
    """None where neither a schema nor the scenario names a main metric."""
    value: float | None
    """Mean over the instances; None if nothing of the metric's split was evaluated."""
    instances: int
    requests: int
    prompt_tokens: int


@dataclass(frozen=True)
class Work:
    """What the engine did for all run entries together."""

    requests: int
    answered_before: int
    """From HELM's cache or an earlier command's journal."""
    seconds: float
    prompt_tokens_asked: int
    prompt_tokens_computed: int
    bound_by: str | None = None
    """What most of the time went into."""
    what_would_help: str | None = None

    @property
    def requests_per_second(self) -> float | None:
        """Rate of the requests that were computed; None if there were none."""
        return (self.requests - self.answered_before) / self.seconds if self.seconds else None


def read_scores(evaluation: Evaluation, since: float) -> list[Score]:
    """Read the main metric of every run of the evaluation's model that HELM has written.

    Args:
        evaluation: Names the folder, and the schema that names metrics first.
        since: Seconds since the epoch; runs that are older belong to another command.
    """
    schema = evaluation.suite.schema
    metrics = _MainMetrics(read_environments(schema) if schema else {}, read_environments(Path(get_default_schema_path())))
    scores = []
    for stats in sorted(evaluation.suite_folder.glob("*/stats.json")):
        run_spec = _json(stats.with_name("run_spec.json"))
        if stats.stat().st_mtime >= since and run_spec["adapter_spec"]["model_deployment"] == evaluation.deployment:
            scores.append(_read_score(stats.parent, metrics.of(run_spec)))
    return scores


@dataclass(frozen=True)
class _MainMetrics:
    """Looks up what HELM calls the environment of a run group: main metric and main split."""

    suite: dict[str, dict[str, str]]
    helm: dict[str, dict[str, str]]

    def of(self, run_spec: dict[str, Any]) -> dict[str, str]:
        """Return the environment of a run: the suite's, the scenario's, or that of HELM's own schema."""
        # The last group of a run entry is the most specific one.
        groups = list(reversed(run_spec["groups"]))
        return _first(groups, self.suite) or _of_scenario(run_spec["scenario_spec"]) or _first(groups, self.helm)


def _first(groups: list[str], environments: dict[str, dict[str, str]]) -> dict[str, str]:
    return next((environments[group] for group in groups if group in environments), {})


def _of_scenario(scenario_spec: dict[str, Any]) -> dict[str, str]:
    try:
        metadata = create_scenario(ScenarioSpec(**scenario_spec)).get_metadata()
    except (NotImplementedError, ModuleNotFoundError, AttributeError, TypeError):
        # Those that helm-summarize takes for a scenario without metadata.
        return {}
    return {"main_name": metadata.main_metric, "main_split": metadata.main_split}


def _read_score(run_folder: Path, environment: dict[str, str]) -> Score:
    states = _json(run_folder / "scenario_state.json")["request_states"]
    metric, split = environment.get("main_name"), environment.get("main_split")
    # Inputs as they are; HELM adds perturbed ones and the worst of them, and statistics of nothing.
    stats = [s for s in _json(run_folder / "stats.json") if "perturbation" not in s["name"] and s["count"]]
    return Score(
        run=re.sub("[,:]model(_deployment)?=[^,]*", "", run_folder.name),
        metric=metric,
        value=next((s["mean"] for s in stats if (s["name"]["name"], s["name"].get("split")) == (metric, split)), None),
        instances=len({state["instance"]["id"] for state in states if split in (None, state["instance"]["split"])}),
        requests=len(states),
        prompt_tokens=round(_mean_prompt_tokens(run_folder) * len(states)),
    )


def _mean_prompt_tokens(run_folder: Path) -> float:
    instances = _json(run_folder / "per_instance_stats.json")
    stats = [s for instance in instances for s in instance["stats"] if s["name"]["name"] == "num_prompt_tokens"]
    total, count = (sum(float(stat[name]) for stat in stats) for name in ("sum", "count"))
    return total / max(count, 1)


def read_work(evaluation: Evaluation, since: float) -> Work | None:
    """Read the report that the runner left in the suite's folder; None if it served nothing.

    Args:
        evaluation: Names the folder and the deployment.
        since: Seconds since the epoch; an older report belongs to another command.
    """
    file = evaluation.suite_folder / WORKLOAD_FILE
    reports = _json(file) if file.is_file() else []
    served = [
        report for report in reports if report["deployment"] == evaluation.deployment and _seconds(report["date"]) >= since
    ]
    if not served:
        return None
    # Where nothing was computed, what stands there was measured by an earlier command.
    measured = [report["measured"] for report in served if (report["measured"] or {}).get("date") == report["date"]]
    stats = [one["stats"] for one in measured]
    return Work(
        requests=sum(report["num_requests"] for report in served),
        answered_before=sum(report["num_cached"] + report["num_resumed"] for report in served),
        seconds=sum(one["seconds"] for one in stats),
        prompt_tokens_asked=sum(one["prompt_tokens_asked"] for one in stats),
        prompt_tokens_computed=sum(one["prompt_tokens_computed"] for one in stats),
        bound_by=measured[-1]["bound_by"] if measured else None,
        what_would_help=measured[-1]["what_would_help"] if measured else None,
    )


def _seconds(date: str) -> float:
    """Seconds since the epoch."""
    return datetime.fromisoformat(date).timestamp()


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))

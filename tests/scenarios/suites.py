"""Run entries through the runner, as helm-run does it, and what HELM wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helm.benchmark.presentation.run_entry import RunEntry
from helm.benchmark.run import run_entries_to_run_specs
from helm.benchmark.run_spec import RunSpec

import flexgen_helm.plugin  # noqa: F401  registers deployments and run entries
from flexgen_helm.helm.runner import FlexGenRunner
from tests.helm.conftest import execution_spec


def parse(entry: str, deployment: str, max_eval_instances: int | None = None) -> RunSpec:
    """Returns what HELM makes of a run entry."""
    (run_spec,) = run_entries_to_run_specs([RunEntry(entry)], max_eval_instances, models_to_run=[deployment])
    return run_spec


@dataclass(frozen=True)
class Run:
    """What HELM wrote about a run."""

    folder: Path

    def read(self, file: str) -> Any:
        """Returns the parsed content of a file."""
        return json.loads((self.folder / file).read_text())

    def stat(self, name: str) -> float:
        """Returns the mean of a statistic over the test split."""
        (mean,) = [stat["mean"] for stat in self.read("stats.json") if stat["name"] == {"name": name, "split": "test"}]
        return float(mean)

    def values(self, name: str) -> list[float]:
        """Returns a statistic of each instance, or of each window of a document, in order."""
        rows = [stat for row in self.read("per_instance_stats.json") for stat in row["stats"]]
        return [stat["sum"] for stat in rows if stat["name"]["name"] == name]


def run_entry(entry: str, deployment: str, output: Path) -> Run:
    """Runs one entry on all its instances."""
    run_spec = parse(entry, deployment, max_eval_instances=10_000)
    spec = execution_spec(output / "cache", sqlite_cache_backend_config=None)
    flags = dict.fromkeys(("skip_instances", "cache_instances", "cache_instances_only", "skip_completed_runs"), False)
    FlexGenRunner(spec, str(output), "suite", **flags, exit_on_error=True).run_all([run_spec])
    return Run(output / "runs" / "suite" / run_spec.name)

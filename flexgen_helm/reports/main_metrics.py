"""Looks up the metric and the split by which HELM judges a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helm.benchmark.presentation.schema import get_default_schema_path
from helm.benchmark.scenarios.scenario import ScenarioSpec, create_scenario

from flexgen_helm.reports.runs import Run
from flexgen_helm.reports.schema import read_environments


@dataclass(frozen=True)
class MainMetric:
    """The metric that counts, and the split of the instances that count."""

    name: str | None
    """None where neither a schema nor the scenario names one."""
    split: str | None
    """None where all instances count."""


@dataclass(frozen=True)
class MainMetrics:
    """The main metrics that schemas name, by run group."""

    suite: Mapping[str, Mapping[str, str]]
    """Environments in the schema of the suite."""
    helm: Mapping[str, Mapping[str, str]]
    """Environments in HELM's own schema."""

    @classmethod
    def read(cls, schema: Path | None) -> MainMetrics:
        """Read HELM's schema and that of a suite, if it has one.

        Raises:
            FlexGenError: The suite's schema cannot be read.
        """
        return cls(read_environments(schema) if schema else {}, read_environments(Path(get_default_schema_path())))

    def find(self, run: Run) -> MainMetric:
        """Return what the suite's schema names, or else the scenario, or else HELM's schema.

        Raises:
            CorruptFile: The run spec cannot be read.
        """
        # The last group of a run entry is the most specific one.
        groups = list(reversed(run.spec["groups"]))
        environment = _first(groups, self.suite) or _of_scenario(run.spec["scenario_spec"]) or _first(groups, self.helm)
        return MainMetric(environment.get("main_name"), environment.get("main_split"))


def _first(groups: list[str], environments: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
    return next((environments[group] for group in groups if group in environments), {})


def _of_scenario(scenario_spec: dict[str, Any]) -> dict[str, str]:
    try:
        metadata = create_scenario(ScenarioSpec(**scenario_spec)).get_metadata()
    except (NotImplementedError, ModuleNotFoundError, AttributeError, TypeError):
        # Those that helm-summarize takes for a scenario without metadata.
        return {}
    return {"main_name": metadata.main_metric, "main_split": metadata.main_split}

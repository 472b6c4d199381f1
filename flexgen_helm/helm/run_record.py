"""Records of serving requests: the printed line, and the JSON files next to HELM's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from helm.benchmark.model_deployment_registry import ModelDeployment

from flexgen_helm.helm.deployment import named_model
from flexgen_helm.policy.bound import bound_of
from flexgen_helm.run_stats import RunStats
from flexgen_helm.types import EngineInfo

WORKLOAD_FILE = "flexgen_workload.json"
"""In the suite's folder: one entry for each deployment and set of runs that was served, see ``WorkloadReport``."""
RUN_FILE = "flexgen.json"
"""In the folder of every run, see ``run_report``."""

Source = Literal["computed", "cached", "resumed", "failed"]
"""Origin of an answer: this command, HELM's cache, an earlier command's journal, or none because the request failed."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class WorkloadReport:
    """The cost of serving the requests of a deployment."""

    deployment: str
    num_requests: int
    num_cached: int
    num_resumed: int
    stats: RunStats
    """Statistics of the requests that were neither cached nor resumed."""
    engine: EngineInfo
    date: str = field(default_factory=_now)
    """When serving ended."""

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt tokens computed and tokens generated; None where nothing was computed."""
        tokens = self.stats.prompt_tokens_computed + self.stats.generated_tokens
        return tokens / self.stats.seconds if self.stats.seconds else None

    @property
    def measured(self) -> dict[str, Any] | None:
        """Figures measured while requests were computed; None if none were computed."""
        if not self.stats.num_jobs:
            return None
        bound = bound_of(self.stats)
        return {
            "date": self.date,
            "tokens_per_second": self.tokens_per_second,
            "roofline_efficiency": self.stats.roofline_efficiency,
            "bound_by": None if bound is None else bound.what,
            "what_would_help": None if bound is None else bound.advice,
            "stats": self.stats.as_dict(),
        }

    def summary(self) -> str:
        """Return the line that a runner prints at the end."""
        from flexgen_helm.runtime.progress import summary

        counts = f"{self.deployment}: {self.num_requests:,} requests, {self.num_cached:,} of them cached"
        counts += f", {self.num_resumed:,} resumed" if self.num_resumed else ""
        if not self.stats.num_jobs:
            return counts
        limit = "" if self.stats.roofline_efficiency is None else f", {self.stats.roofline_efficiency:.0%} of the limit"
        expected = self.stats.forecast_text()
        limit += "" if expected is None else f", {expected}"
        bound = bound_of(self.stats)
        advice = "" if bound is None else f". Most time went into {bound.what}; what helps: {bound.advice}"
        return f"{counts}; {summary(self.stats)}{limit}{advice}"

    def as_dict(self, runs: Sequence[str]) -> dict[str, Any]:
        """Return the entry for ``flexgen_workload.json`` in plain types.

        Args:
            runs: Names of the runs whose requests they were.
        """
        plain = asdict(self)
        return {
            **{name: plain[name] for name in ("deployment", "date", "num_requests", "num_cached", "num_resumed")},
            "runs": sorted(runs),
            "engine": plain["engine"],
            "measured": self.measured,
        }


def with_entry(text: str, entry: dict[str, Any]) -> str:
    """Return the text of ``flexgen_workload.json`` with an entry in the place of that of the same deployment and runs.

    Args:
        text: The old one; empty where there was no file.
        entry: See ``WorkloadReport.as_dict``.
    """
    try:
        known = [old for old in json.loads(text) if "runs" in old] if text.strip() else []
    except (ValueError, TypeError):
        known = []  # damaged, and no more than a report
    names = ("deployment", "runs")
    same = [old for old in known if all(old[name] == entry[name] for name in names)]
    others = [old for old in known if old not in same]
    return json.dumps([*others, keep_measured(entry, same[-1] if same else {})], indent=2)


def keep_measured(report: dict[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report that keeps the last measurement of the same deployment where nothing was computed this time."""
    if report["measured"] is not None or old.get("deployment") != report["deployment"]:
        return report
    return {**report, "measured": old.get("measured")}


def run_report(
    deployment: ModelDeployment, workload: WorkloadReport, sources: Sequence[Source], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what ``flexgen.json`` of one run holds.

    Args:
        deployment: Served the run.
        workload: Record of all requests that were served together with this run's. Throughput is theirs, not the run's.
        sources: Origin of each answer of this run.
        environment: See `flexgen_helm.machine.identity.environment`.
    """
    model = named_model(deployment.client_spec.args)
    return {
        "deployment": deployment.name,
        "model": model.name_or_path,
        "variant": model.compression.canonical if model.compression else None,
        **asdict(workload.engine),
        "environment": dict(environment),
        "requests": {"total": len(sources), **Counter(sources)},
        "workload": {
            "date": workload.date,
            "requests": workload.num_requests,
            "cached": workload.num_cached,
            "resumed": workload.num_resumed,
        },
        "measured": workload.measured,
    }

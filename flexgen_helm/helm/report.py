"""What serving requests took, as it is printed and as it stands beside HELM's own files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from helm.benchmark.model_deployment_registry import ModelDeployment

from flexgen_helm.types import EngineInfo, RunStats

WORKLOAD_FILE = "flexgen_workload.json"
"""In the suite's folder: one entry for each deployment that was served, see ``WorkloadReport``."""
RUN_FILE = "flexgen.json"
"""In the folder of every run, see ``run_report``."""

Source = Literal["computed", "cached", "resumed", "failed"]
"""Where an answer came from: this command, HELM's cache, an earlier command's journal, or nowhere."""


@dataclass(frozen=True)
class WorkloadReport:
    """What serving the requests of a deployment took."""

    deployment: str
    num_requests: int
    num_cached: int
    num_resumed: int
    stats: RunStats
    """Of the requests that were neither cached nor resumed."""
    engine: EngineInfo
    share_of_limit: float | None
    """See ``Engine.share_of_limit``."""

    @property
    def tokens_per_second(self) -> float | None:
        """Prompt tokens computed and tokens generated; None where nothing was computed."""
        tokens = self.stats.prompt_tokens_computed + self.stats.generated_tokens
        return tokens / self.stats.seconds if self.stats.seconds else None

    def summary(self) -> str:
        """Return the line that a runner prints at the end."""
        # It comes with torch, which is loaded anyway when there is something to report.
        from flexgen_helm.runtime.progress import summary

        counts = f"{self.deployment}: {self.num_requests:,} requests, {self.num_cached:,} of them cached"
        counts += f", {self.num_resumed:,} resumed" if self.num_resumed else ""
        limit = "" if self.share_of_limit is None else f", {self.share_of_limit:.0%} of the limit"
        return f"{counts}; {summary(self.stats)}{limit}" if self.stats.num_jobs else counts

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain types, for JSON."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second, "stats": self.stats.as_dict()}


def run_report(deployment: ModelDeployment, workload: WorkloadReport, sources: Sequence[Source]) -> dict[str, Any]:
    """Return what ``flexgen.json`` of one run holds.

    Args:
        deployment: Which served the run.
        workload: Of all requests that were served together with this run's: throughput is theirs, not the run's.
        sources: Where each answer of this run came from.
    """
    return {
        "deployment": deployment.name,
        "model": deployment.client_spec.args["name_or_path"],
        # Compressed variants of a model will be named here.
        "variant": None,
        **asdict(workload.engine),
        "peak_bytes": workload.stats.peak_bytes,
        "requests": {"total": len(sources), **Counter(sources)},
        "workload": {
            "requests": workload.num_requests,
            "cached": workload.num_cached,
            "resumed": workload.num_resumed,
            "tokens_per_second": workload.tokens_per_second,
            "share_of_limit": workload.share_of_limit,
            "computed": workload.stats.as_dict(),
        },
    }

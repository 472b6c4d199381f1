"""``helm-run`` itself under the limit: a deployment in YAML with a policy, ``max_memory`` and an offload folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from flexgen_helm.assets import install_helm_data
from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.deployment import CLIENT, RUNNER
from flexgen_helm.reports.runs import only_run
from flexgen_helm.runs.memory_limit.process import Limits, run_limited

DEPLOYMENT = "flexgen/benchmark/larger-than-ram"
SUITE = "suite"


def run_helm(entry: str, model: Path, arguments: dict[str, Any], limits: Limits, output: Path, *, instances: int) -> list[str]:
    """Run one entry and read HELM's own files.

    Args:
        entry: Run entry without a model.
        model: The model's folder.
        arguments: Keywords of ``Engine.from_pretrained``; they are written into the deployment.
        limits: Limits of the command.
        output: HELM's output folder; made.
        instances: HELM's ``--max-eval-instances``.

    Returns:
        Lines that say what came out.

    Raises:
        FlexGenError: If the command failed or was killed.
    """
    install_helm_data(output)
    write_deployment(output / "local", model, arguments)
    command = [sys.executable, "-m", "helm.benchmark.run", "--run-entries", f"{entry},model={DEPLOYMENT}", "--suite", SUITE]
    command += ["--output-path", str(output), "--local-path", str(output / "local"), "-m", str(instances)]
    command += ["--runner-class-name", RUNNER, "--plugins", "flexgen_helm.plugin", "--disable-cache"]
    measured = run_limited(command, limits, output / "log.txt")
    if measured.ended.out_of_memory:
        raise FlexGenError(f"helm-run was killed because memory was used up. Raise --memory. Its log:\n{measured.log_end}")
    run = only_run(output / "runs" / SUITE)
    requests = run.requests()
    answered = sum(bool(request.completions) for request in requests)
    means = {stat.name: stat.mean for stat in run.stats()}
    return [
        f"helm-run under the limit: {answered} of {len(requests)} requests answered, command {measured.ended.seconds:.1f} s",
        f"  {run.name}",
        f"  exact_match {means['exact_match']}",
    ]


def write_deployment(local_path: Path, model: Path, arguments: dict[str, Any]) -> None:
    """Write ``model_deployments.yaml``."""
    client = {"class_name": CLIENT, "args": {"name_or_path": str(model), **arguments}}
    local_path.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"model_deployments": [{"name": DEPLOYMENT, "client_spec": client}]})
    (local_path / "model_deployments.yaml").write_text(text, encoding="utf-8")

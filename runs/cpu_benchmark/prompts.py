"""Prompts as HELM itself makes them: a dry run of its own runner, read back from the file that it leaves."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from flexgen_helm.assets import install_helm_data
from flexgen_helm.reports.runs import only_run

SUITE = "prompts"


def helm_prompts(run_entry: str, model_folder: Path, count: int) -> list[str]:
    """Returns the prompts of a run entry.

    Args:
        run_entry: A run entry of ``helm-run --run-entries``, without a model.
        model_folder: The model whose tokenizer decides what fits its context.
        count: Number of instances at most, HELM's ``--max-eval-instances``.

    Returns:
        One prompt for each request that HELM would send, in HELM's order.

    Raises:
        subprocess.CalledProcessError: If HELM fails; its own output says why.
        CorruptFile: The run entry is not that of one run.
    """
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        install_helm_data(output)
        command = [sys.executable, "-m", "helm.benchmark.run", "--dry-run", "--disable-cache", "--suite", SUITE]
        command += ["--run-entries", f"{run_entry},model=flexgen/{model_folder}", "-m", str(count)]
        command += ["--output-path", name, "--local-path", str(output / "local"), "--plugins", "flexgen_helm.plugin"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=name)
        return [request.prompt for request in only_run(output / "runs" / SUITE).requests()]

"""``helm-run`` as a process of its own: its wall clock, its steps, its log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.deployment import RUNNER as RUNNER

SUITE = "suite"


@dataclass(frozen=True)
class Finished:
    """A command that has ended well."""

    output: Path
    """HELM's output folder."""
    wall_s: float
    steps_s: dict[str, float]
    """Wall clock of each step of ``sampled.STEPS``; what is missing is the start and end of Python."""
    processor_s: dict[str, float]
    """Processor time of each step, of the engine's thread as well where it is watched."""
    log: str

    @property
    def suite(self) -> Path:
        """Folder of the runs."""
        return self.output / "runs" / SUITE


def helm_run(
    entries: Sequence[str], output: Path, arguments: Sequence[str], *, threads: int, watch: Literal["main", "all"]
) -> Finished:
    """Run entries, offline, with ``output/prod_env`` as HELM's local path, and without what its plugins would add.

    Args:
        entries: With their models.
        output: HELM's output folder; made if missing.
        arguments: More of ``helm-run``.
        threads: Number of PyTorch's threads.
        watch: Threads whose processor time is told apart: the main thread's alone, or the engine's thread's as well.

    Raises:
        FlexGenError: The command failed; the end of its log says why.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)
    steps, log = output / "steps.json", output / "log.txt"
    command = [sys.executable, "-m", "flexgen_helm.runs.helm_overhead.sampled", str(steps), watch, "--run-entries", *entries]
    command += ["--suite", SUITE, "--output-path", str(output), "--local-path", str(output / "prod_env"), *arguments]
    # HELM looks for a sentence splitter on the network unless it finds a folder of this name.
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "NLTK_DATA": str(output / "nltk_data"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **variables})
    wall_s = time.perf_counter() - start
    text = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode:
        raise FlexGenError(f"helm-run ended with status {process.returncode}. The end of its log:\n{text[-3000:]}")
    seconds = json.loads(steps.read_text(encoding="utf-8"))
    return Finished(output, wall_s, seconds["wall"], seconds["processor"], text)

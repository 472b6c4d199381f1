"""Fetch a model and data, evaluate with HELM, print the scores: ``python -m flexgen_helm.runs.quickstart``."""

from __future__ import annotations

import argparse
import logging
import shlex
import subprocess
import sys
from pathlib import Path

from flexgen_helm.assets import install_helm_data, smollm2_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.quickstart.commands import (
    SUITE,
    local_path,
    offline_environment,
    run_command,
    server_command,
    suite_file,
    summarize_command,
    write_model_metadata,
)
from flexgen_helm.runs.quickstart.scores import read_scores, read_work, render

MODULES = {"helm-run": "helm.benchmark.run", "helm-summarize": "helm.benchmark.presentation.summarize"}


def main() -> int:
    """Run the suite and return an exit status."""
    parser = argparse.ArgumentParser(prog="python -m flexgen_helm.runs.quickstart", description=__doc__)
    parser.add_argument("-m", "--max-eval-instances", type=int, default=100, metavar="N", help="instances of each entry")
    parser.add_argument("-o", "--output-path", type=Path, default=Path("benchmark_output"), metavar="FOLDER")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder (default: SmolLM2-135M-Instruct)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        model_folder: Path = arguments.model or smollm2_folder()
        install_helm_data(arguments.output_path)
    except FlexGenError as error:
        print(error, file=sys.stderr)
        return 1
    write_model_metadata(model_folder, arguments.output_path)
    for command in (
        run_command(model_folder, arguments.output_path, arguments.max_eval_instances),
        summarize_command(arguments.output_path),
    ):
        status = _execute(command, offline_environment(arguments.output_path))
        if status != 0:
            return status
    _report(arguments.output_path)
    return 0


def _execute(command: list[str], environment: dict[str, str]) -> int:
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    # The same interpreter, whatever is first in PATH.
    module = [sys.executable, "-m", MODULES[command[0]]]
    process = subprocess.run([*module, *command[1:]], env=environment, check=False)
    return process.returncode


def _report(output_path: Path) -> None:
    suite_folder = output_path / "runs" / SUITE
    print(f"\n{render(read_scores(suite_folder, suite_file('schema.yaml')), read_work(suite_folder))}\n")
    print(f"Every prompt, answer and statistic: {suite_folder}")
    print(f"In a browser:                       {shlex.join(server_command(output_path))}")
    print(f"To compute it again, delete:        {local_path(output_path) / 'cache'}")


if __name__ == "__main__":
    sys.exit(main())

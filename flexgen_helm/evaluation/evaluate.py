"""Runs an evaluation and reports what came out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.commands import Evaluation, environment, run_command, server_command, summarize_command
from flexgen_helm.evaluation.preparation import prepare
from flexgen_helm.evaluation.scores import Score, Work, read_scores, read_work
from flexgen_helm.evaluation.suites import find_suite
from flexgen_helm.evaluation.table import render_scores, render_work
from flexgen_helm.plugin import find

MODULES = {"helm-run": "helm.benchmark.run", "helm-summarize": "helm.benchmark.presentation.summarize"}


def make_evaluation(model: str, suite: str, output_path: Path, max_eval_instances: int) -> Evaluation:
    """Check what a user has named.

    Args:
        model: Model folder, hub name, or name of a flexgen deployment.
        suite: See ``find_suite``.
        output_path: HELM's output path.
        max_eval_instances: Of each run entry.

    Raises:
        FlexGenError: There is no such model or suite.
    """
    folder = os.path.expanduser(model)
    if os.path.isdir(folder) or os.path.isabs(folder):
        name = f"flexgen/{os.path.abspath(folder)}"
    elif model.startswith("flexgen/"):
        name = model
    elif re.fullmatch(r"\w[^/]*(/[^/]+)?", model):
        name = f"flexgen/{model}"
    else:
        raise FlexGenError(
            f"There is no model `{model}`: it is neither an existing folder nor the name `<organization>/<model>` of a model "
            "on the hub. Correct the path."
        )
    find(name)
    return Evaluation(name, find_suite(suite), output_path.expanduser(), max_eval_instances)


def evaluate(evaluation: Evaluation) -> int:
    """Run the suite, summarise it, print scores and where everything is.

    Returns:
        Exit status of ``helm-run``, or of ``helm-summarize`` where only that failed; 1 if nothing was run.

    Raises:
        FlexGenError: The output folder cannot be written, or data could not be fetched.
    """
    prepare(evaluation)
    started = time.time()
    status = _execute(run_command(evaluation), evaluation)
    scores = read_scores(evaluation, started)
    summary_status = _execute(summarize_command(evaluation), evaluation) if scores else 0
    if scores:
        _print_scores(evaluation, scores, read_work(evaluation, started))
    if status:
        _complain(
            f"helm-run ended with status {status}, {len(scores)} runs are complete. Its messages above say why: look for "
            "`Error`. The same command again continues: what was answered is not computed again."
        )
    elif not scores:
        _complain(
            f"nothing was run: no run entry of {evaluation.suite.run_entries} is for {evaluation.deployment}. "
            "Write `model=text` in the entries; it stands for every model."
        )
        return 1
    elif summary_status:
        _complain(f"helm-summarize ended with status {summary_status}: the scores are right, but a browser shows no tables.")
    return status or summary_status


def _print_scores(evaluation: Evaluation, scores: Sequence[Score], work: Work | None) -> None:
    print(f"\n{render_scores(scores)}\n")
    if work is not None:
        print(f"{render_work(work)}\n")
    print(f"Every prompt, answer and statistic: {evaluation.suite_folder}")
    print(f"In a browser:                       {shlex.join(server_command(evaluation))}", flush=True)


def _complain(message: str) -> None:
    print(f"flexgen-helm: {message}", file=sys.stderr)


def _execute(command: list[str], evaluation: Evaluation) -> int:
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    # The same interpreter, whatever is first in PATH.
    module = [sys.executable, "-m", MODULES[command[0]], *command[1:]]
    with subprocess.Popen(module, env=environment(evaluation)) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The signal has reached HELM too, which keeps what is finished before it ends.
            process.wait()
            raise

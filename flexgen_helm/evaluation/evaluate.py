"""Runs an evaluation and reports what came out."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexgen_helm.compression.config import resolve
from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.commands import Evaluation, environment, run_command, server_command, settings, summarize_command
from flexgen_helm.evaluation.preparation import prepare
from flexgen_helm.evaluation.processes import cause_of_failure, execute
from flexgen_helm.evaluation.scores import Before, Score, Work, read_scores, read_work
from flexgen_helm.evaluation.suites import find_suite
from flexgen_helm.evaluation.table import render_scores, render_work
from flexgen_helm.helm.deployment import PREFIX, ModelName
from flexgen_helm.plugin import find

Execute = Callable[[list[str], Evaluation, Path], int]


def make_evaluation(
    model: str, suite: str, output_path: Path, max_eval_instances: int, options: Mapping[str, Any] | None = None
) -> Evaluation:
    """Check what a user has named.

    Args:
        model: Model folder, hub name, or name of a flexgen deployment; with ``@<variant>`` for a compressed one.
        suite: See ``find_suite``.
        output_path: HELM's output path.
        max_eval_instances: Most instances of each run entry.
        options: Keywords of ``Engine.from_pretrained`` that differ from their defaults, as YAML can hold them.

    Raises:
        FlexGenError: There is no such model, variant or suite.
    """
    named = find(_deployment_name(model))
    arguments: dict[str, Any] = {**named.arguments, **(options or {})}
    name = named.deployment(_suffix(arguments))
    return Evaluation(name, find_suite(suite), output_path.expanduser(), max_eval_instances, arguments)


def _deployment_name(model: str) -> str:
    """Return the name of the deployment of a model that a user has named in any way.

    Raises:
        FlexGenError: There is no such model or variant.
    """
    if model.startswith(f"{PREFIX}/") and not os.path.isdir(model):
        return model
    source, compression = resolve(os.path.expanduser(model))
    if os.path.isdir(source) or os.path.isabs(source):
        return ModelName(os.path.abspath(source), compression=compression).deployment()
    if not re.fullmatch(r"\w[^/]*(/[^/]+)?", source):
        raise FlexGenError(
            f"There is no model `{model}`: it is neither an existing folder nor the name `<organization>/<model>` of a model "
            "on the hub. Correct the path."
        )
    return ModelName(source, compression=compression).deployment()


def _suffix(arguments: Mapping[str, Any]) -> str:
    """Name the numerics, so that runs with others do not overwrite each other. Placement changes no answer and no name."""
    policy = arguments.get("policy", {})
    named = [arguments[name] for name in ("dtype", "device", "rows") if name in arguments]
    named += [f"kv-{arguments['kv_dtype']}"] if "kv_dtype" in arguments else []
    named += ["compiled"] if arguments.get("compile_layers") else []
    named += [f"{name}-{policy[name]}" for name in ("gpu_batch_size", "gpu_batch_tokens", "cpu_attention") if name in policy]
    return f"+{'+'.join(named)}" if named else ""


@dataclass(frozen=True)
class Outcome:
    """What came out of an evaluation."""

    evaluation: Evaluation
    log: Path
    """What HELM's commands printed."""
    scores: list[Score]
    """Of the runs that are complete."""
    work: Work | None
    """None where the runner served nothing."""
    status: int
    """Exit status of ``helm-run``, or of ``helm-summarize`` where only that failed; 1 if nothing was run."""
    complaint: str
    """What went wrong and what to do; empty if nothing did."""


def carry_out(evaluation: Evaluation, log: Path, execute: Execute, *, again: str) -> Outcome:
    """Run the suite, for which all is prepared, and summarise it.

    Args:
        evaluation: The model and the suite.
        log: File for what HELM's commands print.
        execute: Runs a command of HELM, appends what it prints to the log, and returns its exit status.
        again: What the user does to continue, at the beginning of a sentence.
    """
    before = Before.of(evaluation.suite_folder)
    status = execute(run_command(evaluation), evaluation, log)
    cause = cause_of_failure(status, log) if status else ""
    scores = read_scores(evaluation, before)
    summary_status = execute(summarize_command(evaluation), evaluation, log) if scores else 0
    complaint = ""
    if status:
        complaint = (
            f"helm-run ended with status {status}, {len(scores)} runs are complete. {again} to continue: "
            f"finished answers are not computed again. HELM's log is {log}.\n  {cause}"
        )
    elif not scores:
        complaint = (
            f"nothing was run: no run entry of {evaluation.suite.run_entries} is for {evaluation.deployment}. "
            "Write `model=text` in the entries; it stands for every model."
        )
    elif summary_status:
        complaint = (
            f"helm-summarize ended with status {summary_status}: the scores are right, but a browser shows no tables. "
            f"HELM's log is {log}.\n  {cause_of_failure(summary_status, log)}"
        )
    work = read_work(evaluation, before) if scores else None
    return Outcome(evaluation, log, scores, work, status or summary_status or int(not scores), complaint)


def evaluate(evaluation: Evaluation, *, verbose: bool = False) -> int:
    """Run the suite in processes of HELM, summarise it, print scores and where everything is.

    Args:
        evaluation: The model and the suite.
        verbose: Whether HELM's log is shown.

    Returns:
        See `Outcome.status`.

    Raises:
        FlexGenError: The output folder cannot be written, or data could not be fetched.
    """
    suite = evaluation.suite
    print(f"{suite.run_entries}: {suite.num_entries} run entries, at most {evaluation.max_eval_instances} instances of each")
    prepare(evaluation)
    outcome = carry_out(
        evaluation, evaluation.new_log(), partial(_execute, verbose=verbose), again="Run the same command again"
    )
    if outcome.scores:
        _print_scores(outcome)
    if outcome.complaint:
        print(f"flexgen-helm: {outcome.complaint}", file=sys.stderr)
    return outcome.status


def _print_scores(outcome: Outcome) -> None:
    print(f"\n{render_scores(outcome.scores)}\n")
    if outcome.work is not None:
        print(f"{render_work(outcome.work)}\n")
    print(f"Every prompt, answer and statistic: {outcome.evaluation.suite_folder}")
    print(f"In a browser:                       {shlex.join(server_command(outcome.evaluation))}")
    print(f"HELM's log:                         {outcome.log}", flush=True)


def _execute(command: list[str], evaluation: Evaluation, log: Path, *, verbose: bool) -> int:
    variables = settings(evaluation) if command[0] == "helm-run" else {}
    shown = [*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)]
    print(f"\n$ {' '.join(shown)}\n", flush=True)
    return execute(command, environment(evaluation), log, verbose=verbose)

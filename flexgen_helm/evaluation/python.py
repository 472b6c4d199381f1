"""`flexgen_helm.evaluate`: a suite of HELM in this process, with the scores as a data frame. Imports HELM when it is called."""

from __future__ import annotations

import dataclasses
import random
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.choices import EngineChoices, plain_choices
from flexgen_helm.helm.installed import require_helm

if TYPE_CHECKING:
    import pandas as pd

    from flexgen_helm.evaluation.evaluate import Outcome


@dataclass(frozen=True)
class Paths:
    """Where an evaluation is."""

    suite: Path
    """Folder of the suite's results."""
    runs: Mapping[str, Path]
    """Folder of each run, with every prompt, answer and statistic, by its name in the data frame."""
    log: Path
    """What HELM printed."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation found; ``frame, paths = scores`` takes it apart. In a notebook it shows itself as a table."""

    frame: pd.DataFrame
    """One row a run entry, by its name: its main metric, score, number of instances, requests and prompt tokens.

    Columns are ``metric``, ``score`` (NaN if nothing of the metric's split was evaluated), ``instances``, ``requests`` and
    ``prompt_tokens``.
    """
    paths: Paths
    commands: Sequence[str]
    """The commands of HELM that do the same, and the one that shows the results in a browser."""
    summary: str
    """Table and work as text, as ``flexgen-helm eval`` prints them."""
    work: str
    """What the engine did, as ``flexgen-helm eval`` prints it; empty if it was not asked."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.frame, self.paths))

    def __str__(self) -> str:
        return self.summary

    def __repr__(self) -> str:
        return self.summary

    def _repr_html_(self) -> str:
        from html import escape

        table = self.frame.to_html(float_format="{:.3f}".format, na_rep="-")
        return f"{table}<p>{escape(self.work)}</p><p>{escape(str(self.paths.suite))}</p>"


class EvaluationFailed(FlexGenError):
    """An evaluation of which not all runs are complete. The same call continues; finished answers are not computed again."""

    def __init__(self, message: str, scores: Scores | None) -> None:
        """Args: message: What went wrong. scores: Of the runs that are complete; None: there are none."""
        super().__init__(message)
        self.scores = scores


def evaluate(
    model: str | PathLike[str],
    *,
    suite: str | PathLike[str],
    max_instances: int = 100,
    out: str | PathLike[str] = "benchmark_output",
    verbose: bool = False,
    **engine: Unpack[EngineChoices],
) -> Scores:
    """Evaluate a model on a suite of HELM, in this process.

    It does what ``flexgen-helm eval`` does. The engine stays loaded, and serves the next call for the same model and options;
    another model's takes its place. One evaluation runs at a time, and what the process prints meanwhile goes to the log.

    Args:
        model: Model folder or name on the hub; with ``@w4`` and the like a compressed variant of it.
        suite: Name of a suite of this package, or path of a ``run_entries.conf`` or of a folder that holds one.
        max_instances: Most instances of each run entry.
        out: HELM's output folder; made if it is missing.
        verbose: Whether HELM's log is shown; otherwise steps and a progress bar are.
        engine: Keywords of ``Engine.from_pretrained``, see `EngineChoices`.

    Raises:
        FlexGenError: HELM is not installed, there is no such model, suite or option, or data could not be fetched.
        EvaluationFailed: A run has failed; the error has the scores of the others.
        KeyboardInterrupt: Finished answers are kept.
    """
    require_helm()
    if isinstance(max_instances, bool) or not isinstance(max_instances, int) or max_instances < 1:
        raise FlexGenError(f"max_instances is {max_instances!r}. Give a number of at least 1.")
    options = plain_choices(engine)
    with _random_states():
        outcome = _carry_out((fspath(model), fspath(suite), Path(out).absolute(), max_instances, options), verbose=verbose)
    scores = _scores(outcome) if outcome.scores else None
    if scores is None or outcome.complaint:
        raise EvaluationFailed(outcome.complaint, scores)
    return scores


def _carry_out(asked: tuple[str, str, Path, int, Mapping[str, Any]], *, verbose: bool) -> Outcome:
    from flexgen_helm.evaluation.evaluate import carry_out, make_evaluation
    from flexgen_helm.evaluation.preparation import prepare

    evaluation = make_evaluation(*asked)
    prepare(evaluation)
    from flexgen_helm.evaluation.in_process import execute_here, logged
    from flexgen_helm.helm.console import Console

    log, console = evaluation.new_log(), Console(None if verbose else _screen())
    with logged(log, evaluation, verbose=verbose):
        execute = partial(execute_here, console=console)
        return carry_out(evaluation, log, execute, again="Call evaluate in the same way again")


@contextmanager
def _random_states() -> Iterator[None]:
    """Give back the states of the random generators that HELM seeds."""
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _screen() -> Any:
    """Return the stream that shows progress: in a notebook standard output, for the other one looks like errors there."""
    from flexgen_helm.runtime.bars import is_notebooks

    return sys.stdout if is_notebooks(sys.stdout) else sys.stderr


def _scores(outcome: Outcome) -> Scores:
    import pandas as pd

    from flexgen_helm.evaluation.commands import run_command, server_command, summarize_command
    from flexgen_helm.evaluation.table import render_scores, render_work

    evaluation = outcome.evaluation
    rows = [dataclasses.asdict(score) for score in outcome.scores]
    frame = pd.DataFrame(rows).drop(columns="folder").rename(columns={"value": "score"}).set_index("run")
    frame["score"] = frame["score"].astype(float)  # NaN, not None
    commands = [command(evaluation) for command in (run_command, summarize_command, server_command)]
    work = "" if outcome.work is None else render_work(outcome.work)
    return Scores(
        frame,
        Paths(evaluation.suite_folder, {score.run: score.folder for score in outcome.scores}, outcome.log),
        tuple(map(shlex.join, commands)),
        "\n\n".join(filter(None, [render_scores(outcome.scores), work, f"in {evaluation.suite_folder}"])),
        work,
    )

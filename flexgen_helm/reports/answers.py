"""What one configuration answered on all its runs, as data frames: the base of reports and gates.

A reader of another harness's files makes the same: `Answers` with the columns of `ROW_COLUMNS` and `REQUEST_COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from flexgen_helm.reports.engine_record import EngineRecord, engine_record
from flexgen_helm.reports.main_metrics import MainMetric, MainMetrics
from flexgen_helm.reports.reading import OF_WINDOWS, Asked, Key, Row, keyed_requests, method_of, read_rows
from flexgen_helm.reports.runs import Run
from flexgen_helm.reports.selection import Selection

KEY_COLUMNS = ("scenario", *Key._fields)
"""What a row is joined by; ``scenario`` is the run entry without its model."""
ROW_COLUMNS = (*KEY_COLUMNS, *(field.name for field in fields(Row) if field.name != "key"), "counts", "cluster")
"""Those of `Row`; ``counts``: whether the row is of the split by which HELM judges; ``cluster``: run entry and train trial."""
REQUEST_COLUMNS = (*KEY_COLUMNS, *(field.name for field in fields(Asked) if field.name != "key"))

Texts = Callable[[str], Mapping[Key, list[Mapping[str, Any]]]]
"""Function that reads again what was asked in a run: the requests of each row, each with ``prompt`` and other fields."""


@dataclass(frozen=True)
class RunFacts:
    """What holds for all rows of a run."""

    scenario: str
    group: str
    """The broadest of HELM's run groups, such as ``mmlu``."""
    metric: str
    """Name of the main metric; empty where neither a schema nor the scenario names one."""
    lower_is_better: bool
    score: float | None
    """HELM's own mean of the main metric."""
    engine: EngineRecord | None
    """None: this package's runner did not serve the run."""
    reasons: Mapping[str, str]
    """Why a column of the rows is empty in the whole run, by its name."""


@dataclass(frozen=True)
class Answers:
    """One configuration: a model in one form, on all its runs."""

    name: str
    """Short, for tables and plots."""
    deployment: str
    """Whole name, or what stands for it with another harness."""
    runs: Mapping[str, RunFacts]
    """By run entry without the model."""
    rows: pd.DataFrame
    """`ROW_COLUMNS`; one row for each run entry, instance, perturbation, train trial and window."""
    requests: pd.DataFrame
    """`REQUEST_COLUMNS`; several rows for an instance where each choice is a request."""
    texts: Texts

    @property
    def engine(self) -> EngineRecord | None:
        """What served the first run that has a record."""
        return next((facts.engine for facts in self.runs.values() if facts.engine is not None), None)


@dataclass(frozen=True)
class Metrics:
    """Which metric counts in each run."""

    main: MainMetrics
    lower: Mapping[str, bool]
    """Whether lower is better, by metric."""


def read_answers(selection: Selection, metrics: Metrics, *, name: str) -> Answers:
    """Read the runs of one deployment, one after the other.

    Args:
        selection: The runs.
        metrics: Names the main metric of each.
        name: Of the configuration.

    Raises:
        CorruptFile: A file of a run cannot be read.
    """
    facts, rows, requests = {}, [], []
    for scenario, run in selection.runs.items():
        main = metrics.main.find(run)
        found, asked = read_rows(run, main)
        rows.append(_row_frame(scenario, found, main))
        requests.append(_frame(scenario, asked, REQUEST_COLUMNS))
        facts[scenario] = _facts(run, main, metrics.lower.get(main.name or "", False), rows[-1])
    return Answers(
        name=name,
        deployment=selection.deployment,
        runs=facts,
        rows=pd.concat(rows, ignore_index=True),
        requests=pd.concat(requests, ignore_index=True),
        texts=lambda scenario: _texts(selection.runs[scenario]),
    )


def _frame(scenario: str, entries: Iterable[Row | Asked], columns: tuple[str, ...]) -> pd.DataFrame:
    names = [name for name in columns if name not in KEY_COLUMNS]
    lines = [(scenario, *entry.key, *(getattr(entry, name) for name in names)) for entry in entries]
    return pd.DataFrame(lines, columns=[*KEY_COLUMNS, *names])


def _row_frame(scenario: str, rows: Iterable[Row], main: MainMetric) -> pd.DataFrame:
    frame = _frame(scenario, rows, ROW_COLUMNS[:-2])
    frame["counts"] = (frame["split"] == main.split) | (main.split is None)
    frame["cluster"] = [f"{scenario} {trial}" for trial in frame["trial"]]
    return frame


def _facts(run: Run, main: MainMetric, lower_is_better: bool, rows: pd.DataFrame) -> RunFacts:
    record = run.record()
    groups = run.spec["groups"]
    return RunFacts(
        scenario=run.scenario,
        group=str(groups[0]) if groups else run.scenario,
        metric=main.name or "",
        lower_is_better=lower_is_better,
        score=_score(run, main),
        engine=None if record is None else engine_record(record),
        reasons={name: text for name, text in _reasons(method_of(run), main).items() if rows[name].isna().all()},
    )


def _score(run: Run, main: MainMetric) -> float | None:
    stats = [stat for stat in run.stats() if stat.perturbation is None and stat.count]
    return next((stat.mean for stat in stats if (stat.name, stat.split) == (main.name, main.split)), None)


def _reasons(method: str, main: MainMetric) -> dict[str, str]:
    """Return why a column can be empty, for an adapter method of HELM."""
    scoring = method == "language_modeling" or method.startswith("multiple_choice_separate") or method == "ranking_binary"
    score = f"HELM computes {main.name} for the whole run only"
    if main.name is None:
        score = "neither a schema nor the scenario names a main metric"
    elif method == "language_modeling" and main.name not in OF_WINDOWS:
        score = f"{main.name} is no mean over windows"
    nothing = "nothing is generated: " + ("a text is scored" if method == "language_modeling" else "choices are scored")
    generated = "HELM keeps log-probabilities of generated tokens only, and the right answer was not scored"
    scored = "the client reported no log-probabilities, or the answer's tokens cannot be told from the prompt's"
    return {
        "score": score,
        "logprob": scored if scoring else generated,
        "answer_logprob": "no text is generated"
        if method == "language_modeling"
        else "the client reported no log-probabilities",
        "tokens": nothing if scoring else "the run has no answers",
        "parsable": nothing if scoring else "the run has no answers",
    }


def _texts(run: Run) -> dict[Key, list[Mapping[str, Any]]]:
    return {key: [request.asked for request in requests] for key, requests in keyed_requests(run).items()}

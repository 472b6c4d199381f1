"""Figures as tables of text, for every kind of page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from flexgen_helm.reports.comparing import Comparison
from flexgen_helm.reports.presentation.words import FIGURES, NOT_OF_BASELINE, OF_ENGINES, TABLES, labels, written


@dataclass(frozen=True)
class GridCell:
    """A cell."""

    text: str
    sort: float
    """The number itself; NaN where it is missing."""
    note: str
    """Number of a note below the table; empty: none."""


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    configuration: str
    scenario: str
    """Short, with the perturbation, if there is one."""
    entry: str
    """The whole run entry; the group's name, or ``all runs``."""
    level: str
    cells: tuple[GridCell, ...]


@dataclass(frozen=True)
class Grid:
    """A table."""

    title: str
    columns: tuple[tuple[str, str], ...]
    """Title and meaning of each column of cells."""
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    """Numbered from 1."""


def grids(comparison: Comparison) -> list[Grid]:
    """Return all tables of a comparison."""
    return [_grid(title, columns, comparison) for title, columns in TABLES.items()]


def _grid(title: str, columns: Sequence[str], comparison: Comparison) -> Grid:
    notes: list[str] = []
    lines = list(_lines(columns, comparison, notes, only_suite=title in OF_ENGINES))
    return Grid(title, tuple((FIGURES[name].title, FIGURES[name].meaning) for name in columns), tuple(lines), tuple(notes))


def _lines(columns: Sequence[str], comparison: Comparison, notes: list[str], *, only_suite: bool) -> Iterator[Line]:
    order = ["level", "scenario", "perturbation"]
    figures = comparison.figures[comparison.figures["figure"].isin(columns)]
    names_of_runs = labels(comparison.baseline.runs)
    names = [each.name for each in (comparison.baseline, *comparison.candidates)]
    if only_suite:
        figures = _one_line_each(figures)
    levels = {"suite": 0, "group": 1, "run": 2}
    for place, part in sorted(figures.groupby(order), key=lambda item: (levels[item[0][0]], *item[0][1:])):
        level, scenario, perturbation = map(str, place)
        for name in names:
            of_name = part[part["configuration"] == name]
            columns_of = of_name[["figure", "value", "low", "high", "note"]].itertuples(index=False, name=None)
            ours = {figure: values for figure, *values in columns_of}
            if ours:
                shown = names_of_runs.get(scenario, scenario) + (f" {perturbation}" if perturbation else "")
                yield Line(name, shown, scenario, level, tuple(_cell(column, ours, notes) for column in columns))


def _one_line_each(figures: pd.DataFrame) -> pd.DataFrame:
    """Return the suite's figures, or those of the first run where no runs can be summarised."""
    rank = figures["level"].map({"suite": 0, "group": 1, "run": 2})
    first = figures.assign(rank=rank).sort_values("rank", kind="stable").drop_duplicates(["configuration", "figure"])
    return first.assign(level="suite", scenario="all runs", perturbation="").drop(columns="rank")


def _cell(column: str, figures: Mapping[str, Sequence[Any]], notes: list[str]) -> GridCell:
    if column not in figures:
        return GridCell("", math.nan, _noted(NOT_OF_BASELINE, notes))
    value, low, high, note = figures[column]
    return GridCell(written(column, value, low, high), float(value), _noted(str(note), notes) if note else "")


def _noted(text: str, notes: list[str]) -> str:
    if text not in notes:
        notes.append(text)
    return str(notes.index(text) + 1)

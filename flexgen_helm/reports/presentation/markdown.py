"""A comparison as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pandas as pd

from flexgen_helm.reports.presentation.grid import Grid

MOST_FLIPS = 20
"""Flipped instances that are listed; all are on the page and in the CSV."""
MOST_CHARACTERS = 80
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#!|~$@:])")
_BEGINNING = re.compile(r"^([-+]|\d+[.)])")


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line: no markup, no HTML, no link, no column, no list."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    plain = _SPECIAL.sub(r"\\\1", plain.replace("&", "&amp;")).replace("<", "&lt;").replace(">", "&gt;")
    plain = re.sub(r"(?i)\b(www)\.", r"\1\\.", plain)
    return _BEGINNING.sub(lambda found: f"{found[1][:-1]}\\{found[1][-1]}", plain)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. Cells must be escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(
    title: str, facts: Sequence[str], grids: Sequence[Grid], flips: pd.DataFrame, plots: Sequence[tuple[str, str]]
) -> str:
    """Return the report.

    Args:
        title: One line.
        facts: Lines below it.
        grids: Tables.
        flips: Instances that flipped.
        plots: Title and file of each plot.
    """
    parts = [f"# {escaped(title)}", "\n".join(f"* {escaped(fact)}" for fact in facts)]
    for grid in grids:
        parts += [f"## {grid.title}", _grid(grid), _notes(grid)]
    parts += [f"![{escaped(name)}]({file})" for name, file in plots]
    parts += ["## Answers that flipped", *_flips(flips)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _grid(grid: Grid) -> str:
    header = ["configuration", "run", *(title for title, _ in grid.columns)]
    rows = [
        [
            escaped(line.configuration),
            escaped(line.scenario),
            *(f"{cell.text}{f'<sup>{cell.note}</sup>' if cell.note else ''}" for cell in line.cells),
        ]
        for line in grid.lines
    ]
    return table(header, rows)


def _notes(grid: Grid) -> str:
    return "\n".join(f"<sup>{number}</sup> {escaped(note)}  " for number, note in enumerate(grid.notes, 1))


def _flips(flips: pd.DataFrame) -> Iterator[str]:
    if flips.empty:
        yield "None."
        return
    if len(flips) > MOST_FLIPS:
        yield f"The first {MOST_FLIPS} of {len(flips):,}; all are in flips.html and pairs.csv."
    columns = ["configuration", "change", "scenario", "instance", "correct", "answer_before", "answer_after"]
    rows = [[_short(str(value)) for value in line] for line in flips[columns].head(MOST_FLIPS).itertuples(index=False)]
    yield table(["configuration", "change", "run", "instance", "correct", "baseline's answer", "answer"], rows)


def _short(text: str) -> str:
    return escaped(text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…")

"""Writes everything that people see of a comparison into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from flexgen_helm.errors import FlexGenError
from flexgen_helm.reports.answers import Answers
from flexgen_helm.reports.comparing import Comparison
from flexgen_helm.reports.flipped import flipped, texts_of
from flexgen_helm.reports.presentation import markdown
from flexgen_helm.reports.presentation.grid import Grid, grids
from flexgen_helm.reports.presentation.page import render_flips, render_report
from flexgen_helm.reports.presentation.plots import draw_all
from flexgen_helm.reports.presentation.tables import write_csv

PAGE, FLIPS, MARKDOWN, PAIRS, FIGURES = "report.html", "flips.html", "report.md", "pairs.csv", "figures.csv"


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    page: Path
    """The others lie beside it."""
    num_flips: int
    grids: Sequence[Grid]
    """The tables that the pages show."""


def write(comparison: Comparison, folder: Path, *, notes: Sequence[str] = ()) -> Written:
    """Write pages, plots, tables and Markdown. Files of the same names are replaced.

    Args:
        comparison: What is shown.
        folder: Made where it is missing.
        notes: Lines below what `facts_of` says.

    Raises:
        FlexGenError: If the folder cannot be written.
        CorruptFile: If prompts cannot be read again.
    """
    before = comparison.baseline
    flips = pd.concat([flipped(each, before, name) for name, each in comparison.joined.items()], ignore_index=True)
    plots, tables, facts = draw_all(comparison), grids(comparison), [*facts_of(comparison), *notes]
    title = f"{', '.join(each.name for each in comparison.candidates)} against {before.name}"
    drawn = [plot for plot in plots if plot.images]
    texts = {
        PAGE: render_report(title, facts, tables, plots, len(flips)),
        FLIPS: render_flips(f"Answers that flipped: {title}", flips, texts_of(flips, before)),
        MARKDOWN: markdown.render(title, facts, tables, flips, [(plot.title, f"{plot.name}.png") for plot in drawn]),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            for kind in ("png", "svg"):
                file = folder / f"{plot.name}.{kind}"
                file.unlink(missing_ok=True)  # of an earlier report
                if kind in plot.images:
                    file.write_bytes(plot.images[kind])
        write_csv(folder / PAIRS, comparison.pairs)
        write_csv(folder / FIGURES, comparison.figures)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", errors="replace")  # answers may hold lone surrogates
    except OSError as error:
        raise FlexGenError(f"The report cannot be written to {folder} ({error}). Give another folder with --out.") from error
    return Written(folder / PAGE, len(flips), tables)


def facts_of(comparison: Comparison) -> list[str]:
    """Return what must be known of a comparison, in lines."""
    lines = [f"Baseline: {described(comparison.baseline)}."]
    for candidate in comparison.candidates:
        joined = comparison.joined[candidate.name]
        missing = joined.missing.sum()
        counted = f"{len(joined.rows):,} pairs"
        if missing.any():
            counted += f"; {missing['candidate']:,} instances are missing here and {missing['baseline']:,} in the baseline"
        if joined.left_out:
            counted += f"; left out, because one side lacks them: {', '.join(joined.left_out)}"
        lines.append(f"{candidate.name}: {described(candidate)}; {counted}.")
    return lines


def described(answers: Answers) -> str:
    """Return in words what a configuration is."""
    engine = answers.engine
    if engine is None:
        return f"{answers.deployment}, served without this package's runner"
    released = f"released as {engine.released_dtype}, " if engine.released_dtype else ""
    digest = f"checkpoint {engine.digest}, " if engine.digest else ""
    return f"{answers.deployment}, {digest}{released}computed in {engine.dtype or 'an unknown dtype'}"

"""The command `flexgen-helm report`: from its options to the printed summary."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

from flexgen_helm.reports.comparing import Choices, compare
from flexgen_helm.reports.presentation.grid import Grid
from flexgen_helm.reports.presentation.write import facts_of, write

SHOWN = ("instances", "score", "standard error", "recovery", "difference", "lost", "gained", "p")
"""Titles of the columns that are printed."""


def report(args: Namespace, say: Callable[[str], None]) -> int:
    """Compare, write the report, print a summary, and return the exit status.

    Args:
        args: Options of the command.
        say: Told what happens, a line at a time.

    Raises:
        FlexGenError: If runs cannot be read or compared, or the report cannot be written.
    """
    choices = Choices.from_options(args)
    comparison = compare(args.baseline, args.candidates, choices, say=say)
    written = write(comparison, args.out, notes=args.note)
    print("\n".join([*facts_of(comparison), *args.note, "", *summary(written.grids[0]), ""]))
    print(f"report: {written.page}\n{written.num_flips:,} answers that flipped: {written.page.with_name('flips.html')}")
    return 0


def summary(grid: Grid) -> list[str]:
    """Return the lines of a table of scores: of all runs together, or of each run where they cannot be summarised."""
    suite = [line for line in grid.lines if line.level == "suite"] or list(grid.lines)
    return list(_aligned(list(_rows(grid, [grid.lines.index(line) for line in suite]))))


def _rows(grid: Grid, chosen: Sequence[int]) -> Iterator[list[str]]:
    places = [at for at, (title, _) in enumerate(grid.columns) if title in SHOWN]
    yield ["configuration", "run", *(grid.columns[at][0] for at in places)]
    for number in chosen:
        line = grid.lines[number]
        yield [line.configuration, line.scenario, *(line.cells[at].text for at in places)]


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()

"""One table of all contenders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from flexgen_helm.runs.agreement import Agreement
from flexgen_helm.runs.resident_benchmark.contenders import Measured

HEADER = ("contender", "processor s", "wall s", "to engine", "differ", "of them ties", "load s", "setting")
WIDTHS = (16, 13, 9, 11, 8, 14, 8)


@dataclass(frozen=True)
class Entry:
    """A contender in one part and one dtype."""

    measured: Measured
    agreement: Agreement
    """With the reference's answers."""

    @property
    def processor_s(self) -> float:
        """Processor seconds, the median."""
        return float(median(self.measured.processor_s))

    @property
    def wall_s(self) -> float:
        """Wall seconds, the median."""
        return float(median(self.measured.wall_s))


Entries = Mapping[str, Entry | str]
"""Contenders of one part and one dtype by name; a text says why one failed."""


def render(title: str, entries: Entries) -> list[str]:
    """Make the lines of one part and one dtype.

    Args:
        title: Title of the part.
        entries: The contenders.
    """
    ours = entries.get("engine")
    engine_s = ours.processor_s if isinstance(ours, Entry) else None
    rows = [_row(name, entry, engine_s) for name, entry in entries.items()]
    return [title, *("  " + _columns(row) for row in (HEADER, *rows))]


def as_dict(entries: Entries) -> dict[str, Any]:
    """Return everything measured, in plain types, without the answers themselves."""
    return {name: {"failed": entry} if isinstance(entry, str) else _plain(entry) for name, entry in entries.items()}


def _plain(entry: Entry) -> dict[str, Any]:
    found = entry.agreement
    counts = {"equal": found.equal, "ties": found.ties, "other": found.other}
    return {**asdict(replace(entry.measured, tokens=[])), "answers": counts}


def _row(name: str, entry: Entry | str, engine_s: float | None) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (name, "failed", "", "", "", "", "", entry)
    ratio = "" if engine_s is None else f"{entry.processor_s / engine_s:.2f}"
    found = entry.agreement
    differ, ties = f"{found.ties + found.other}/{found.compared}", str(found.ties)
    seconds = [f"{value:.1f}" for value in (entry.processor_s, entry.wall_s, entry.measured.load_s)]
    return (name, *seconds[:2], ratio, differ, ties, seconds[2], entry.measured.setting)


def _columns(row: tuple[str, ...]) -> str:
    cells = [text.rjust(width) for text, width in zip(row[1:-1], WIDTHS[1:], strict=True)]
    return f"{row[0].ljust(WIDTHS[0])}{''.join(cells)}  {row[-1]}".rstrip()

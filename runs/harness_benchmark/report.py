"""The backends of one harness side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

HEADER = ("backend", "processor s", "wall s", "to flexgen", "score", "load s", "setting")
WIDTHS = (10, 13, 9, 12, 8, 8)
OURS, THEIRS = "flexgen", "hf"


@dataclass(frozen=True)
class Measured:
    """What was measured of a backend."""

    load_s: float
    score: float
    answers: list[Any]
    """Of each question: log-probabilities of its choices, or the text of the answer."""
    wall_s: list[float]
    processor_s: list[float]
    setting: str
    """The setting that was measured."""
    tried_s: dict[str, list[float]]
    """Processor and wall seconds of all settings for the first questions, where there are several."""


Entries = Mapping[str, Measured | str]
"""The backends of a harness by name; a text says why one failed."""


def render(title: str, entries: Entries) -> list[str]:
    """Make the lines of one harness."""
    ours = entries.get(OURS)
    base = median(ours.processor_s) if isinstance(ours, Measured) else None
    lines = [title, _columns(HEADER)]
    for name, entry in entries.items():
        lines.append(f"  {name}: failed: {entry}" if isinstance(entry, str) else _columns(_row(name, entry, base)))
    for entry in entries.values():
        if isinstance(entry, Measured) and entry.tried_s:
            tried = ", ".join(f"{setting} {processor:.1f} ({wall:.1f})" for setting, (processor, wall) in entry.tried_s.items())
            lines.append(f"  first questions, processor (wall) s: {tried}")
    return [*lines, *_compared(entries)]


def _row(name: str, entry: Measured, base: float | None) -> tuple[str, ...]:
    processor, wall = median(entry.processor_s), median(entry.wall_s)
    ratio = "" if base is None else f"{processor / base:.2f}"
    return (name, f"{processor:.1f}", f"{wall:.1f}", ratio, f"{entry.score:.4f}", f"{entry.load_s:.1f}", entry.setting)


def _columns(row: tuple[str, ...]) -> str:
    cells = "".join(text.rjust(width) for text, width in zip(row[1:-1], WIDTHS[1:], strict=True))
    return f"  {row[0].ljust(WIDTHS[0])}{cells}  {row[-1]}".rstrip()


def _compared(entries: Entries) -> list[str]:
    ours, theirs = entries.get(OURS), entries.get(THEIRS)
    if not isinstance(ours, Measured) or not isinstance(theirs, Measured):
        return []
    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    if all(isinstance(answer, list) for pair in pairs for answer in pair):
        largest = max(abs(x - y) for one, other in pairs for x, y in zip(one, other, strict=True))
        return [f"  largest difference of a log-probability: {largest:.1e}"]
    return [f"  answers that differ: {sum(one != other for one, other in pairs)} of {len(pairs)}"]


def as_dict(entries: Entries) -> dict[str, Any]:
    """Return everything measured, in plain types, without the answers themselves."""
    return {
        name: {"failed": entry} if isinstance(entry, str) else asdict(replace(entry, answers=[]))
        for name, entry in entries.items()
    }

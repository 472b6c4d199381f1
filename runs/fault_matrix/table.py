"""The table: fault by fault, how many there were and what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexgen_helm.runs.fault_matrix.outcomes import FAILURES, VERDICTS, Outcome, Verdict

HEADINGS: dict[Verdict, str] = {
    "answered": "answered right",
    "refused": "refused by name",
    "another": "another by its digest",
}
"""Of columns that are called by more than their verdict."""
SHOWN = tuple(verdict for verdict in VERDICTS if verdict != "skipped")


def counts(outcomes: Sequence[Outcome]) -> dict[str, dict[Verdict, int]]:
    """Count verdicts by fault, in the order in which faults come."""
    found: dict[str, dict[Verdict, int]] = {}
    for each in outcomes:
        row = found.setdefault(each.fault, dict.fromkeys(VERDICTS, 0))
        row[each.verdict] += each.count
    return found


def total(rows: Mapping[str, Mapping[Verdict, int]]) -> dict[Verdict, int]:
    """Add rows."""
    return {verdict: sum(row[verdict] for row in rows.values()) for verdict in VERDICTS}


def as_markdown(parts: Mapping[str, Sequence[Outcome]]) -> str:
    """Return one table of all parts, each with its sum in bold."""
    head = ["fault", "tried", *(HEADINGS.get(verdict, verdict) for verdict in SHOWN)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    whole: list[Outcome] = []
    for part, outcomes in parts.items():
        rows = counts(outcomes)
        whole += outcomes
        lines += [_line(f"{part}: {fault}", row) for fault, row in sorted(rows.items())]
        if len(rows) > 1:
            lines.append(_line(f"**{part}**", total(rows)))
    lines.append(_line("**all**", total(counts(whole))))
    return "\n".join(lines)


def as_json(parts: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Return the counts, and the notes of what failed or was skipped, as plain data."""
    return {
        part: {
            "counts": counts(outcomes),
            "notes": [vars(each) for each in outcomes if each.verdict in (*FAILURES, "skipped")],
        }
        for part, outcomes in parts.items()
    }


def failures(parts: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Return a line for each failure, and for each case that was skipped."""
    return [
        f"{part}: {each.fault}: {each.verdict}: {each.note}"
        for part, outcomes in parts.items()
        for each in outcomes
        if each.verdict in (*FAILURES, "skipped")
    ]


def _line(name: str, row: Mapping[Verdict, int]) -> str:
    tried = sum(row[verdict] for verdict in SHOWN)
    return f"| {name} | {tried:,} | {' | '.join(f'{row[verdict]:,}' for verdict in SHOWN)} |"

"""What became of each fault, kept in a file as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

Verdict = Literal["answered", "refused", "recomputed", "another", "skipped", "lost", "hung", "traceback", "wrong"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""``another``: an answer of another model or of other content, whose digest or text says so. ``skipped``: not tried, with the
reason as note."""
FAILURES: tuple[Verdict, ...] = ("lost", "hung", "traceback", "wrong")
MOST_NOTE = 1500
"""Characters of a note that are kept."""


@dataclass(frozen=True)
class Outcome:
    """How one fault, or several of one kind, ended."""

    fault: str
    """The row of the table that it counts in."""
    verdict: Verdict
    count: int = 1
    note: str = ""
    """What was seen, where it is no success."""


@dataclass(frozen=True)
class Case:
    """What is tried in one go."""

    name: str
    """Of the part's cases; a rerun knows it by this."""
    seconds: float
    """It hangs if it has not ended by then."""


class Ledger:
    """The outcomes of all cases so far: a file of one case a line, so that a rerun goes on where the last one stopped."""

    def __init__(self, file: Path) -> None:
        """Read what is there; a torn last line is as if its case had not been tried."""
        self._file = file
        self._outcomes: dict[tuple[str, str], list[Outcome]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            file.write_text(whole, encoding="utf-8")
        for line in whole.splitlines():
            entry = json.loads(line)
            self._outcomes[entry["part"], entry["case"]] = [Outcome(**each) for each in entry["outcomes"]]

    def has(self, part: str, case: Case) -> bool:
        """Whether a case has been tried."""
        return (part, case.name) in self._outcomes

    def add(self, part: str, case: Case, outcomes: Sequence[Outcome]) -> None:
        """Keep the outcomes of a case."""
        self._outcomes[part, case.name] = list(outcomes)
        entry = {"part": part, "case": case.name, "outcomes": [asdict(each) for each in outcomes]}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def of(self, part: str, cases: Iterable[Case]) -> list[Outcome]:
        """Return the outcomes of those of these cases that have been tried."""
        return [each for case in cases for each in self._outcomes.get((part, case.name), [])]


def merged(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Count equal outcomes that are no failures together."""
    counts: dict[tuple[str, Verdict], int] = {}
    failures = []
    for each in outcomes:
        if each.verdict in FAILURES or each.note:
            failures.append(each)
        else:
            counts[each.fault, each.verdict] = counts.get((each.fault, each.verdict), 0) + each.count
    return [Outcome(fault, verdict, count) for (fault, verdict), count in counts.items()] + failures

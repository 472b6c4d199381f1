"""The table of the documentation: written by the survey, read by the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from tests.survey.judge import Outcome, Verdict

COMMAND = "python -m tests.survey"
PACKAGES = ("flexgen_helm", "transformers", "torch")
INTRODUCTION = """\
# Which models work

Every type of the causal-LM mapping of `transformers`, and the variants that matter as much as a type, built with a few small
layers and random weights, and compared with plain `transformers`, one request at a time: greedy tokens, log-probabilities of
tokens and candidates within 1e-4, of prompts within 3e-4 (level C of [how it works](architecture.md)).

* **packed**: many sequences share a row and the prefix tree; the fastest way.
* **single**: one sequence a row, with transformers' own cache and attention; weights are still read once for all rows. This
  is for models that keep state other than K and V, or do not call transformers' attention interface.
* **refused**: the engine does not load the model, and says why. Nothing is served that fails the check at load.
* **not built**: `transformers` itself cannot run the type as a causal language model of text, or needs another package.
"""


def key(name: str) -> tuple[str, str]:
    """Order of the table: by type, variants below their type."""
    kind, _, label = name.partition("+")
    return kind, label


def render(verdicts: Sequence[Verdict]) -> str:
    """Returns the page as Markdown."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    variants = sum("+" in verdict.name for verdict in verdicts)
    counted = ", ".join(f"{counts[outcome]} {outcome}" for outcome in get_args(Outcome) if counts[outcome])
    lines = [
        INTRODUCTION,
        f"{len(verdicts) - variants} types and {variants} variants: {counted}.",
        f"Made by `{COMMAND}` with " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + ".",
        "",
        "| type | rows | reason or remark |",
        "|---|---|---|",
        *(
            f"| {_cell(verdict.name)} | {verdict.outcome} | {_cell(verdict.remark)} |"
            for verdict in sorted(verdicts, key=lambda verdict: key(verdict.name))
        ),
    ]
    return "\n".join(lines) + "\n"


def read(page: Path) -> dict[str, str]:
    """Returns the outcome by name that a page states."""
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    return {cells[0].removeprefix("| "): cells[1] for cells in rows[1:]}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").strip()

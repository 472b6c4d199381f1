"""The instances that one configuration answered right and the other wrong, with what was asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from flexgen_helm.reports.answers import Answers
from flexgen_helm.reports.join import Joined
from flexgen_helm.reports.reading import Key

LOST, GAINED = "lost", "gained"


def flipped(joined: Joined, baseline: Answers, candidate: str) -> pd.DataFrame:
    """Return the joined rows whose score differs, where scores are shares of right answers (from 0 to 1, higher is better).

    Args:
        joined: The baseline and one candidate.
        baseline: Says which runs have such scores, and what was asked.
        candidate: Name of the candidate.

    Returns:
        The columns of `Joined.rows`, and ``configuration``, ``change`` (``lost`` or ``gained``) and ``text``, what was asked.

    Raises:
        CorruptFile: A run's requests cannot be read again.
    """
    shares = [name for name, facts in baseline.runs.items() if not facts.lower_is_better]
    rows = joined.rows[joined.rows["scenario"].isin(shares) & joined.rows["counts"]]
    inside = rows["score_before"].between(0, 1) & rows["score_after"].between(0, 1)
    found = rows[inside & (rows["score_before"] != rows["score_after"])].copy()
    found.insert(0, "configuration", candidate)
    found["change"] = [
        LOST if after < before else GAINED for before, after in zip(found.score_before, found.score_after, strict=True)
    ]
    return found.reset_index(drop=True)


def texts_of(rows: pd.DataFrame, baseline: Answers) -> dict[tuple[str, Key], str]:
    """Return what was asked in some rows, by run entry and key. Each run is read once.

    Raises:
        CorruptFile: A run's requests cannot be read again.
    """
    texts = {}
    keys = {(str(row[0]), Key(*row[1:])) for row in rows[["scenario", *Key._fields]].itertuples(index=False)}
    for scenario in sorted({scenario for scenario, _ in keys}):
        asked = baseline.texts(scenario)
        texts.update({(scenario, key): text_of(asked.get(key, [])) for where, key in keys if where == scenario})
    return texts


def text_of(asked: Sequence[Mapping[str, Any]]) -> str:
    """Return what the requests of a row have in common at their beginning: all of one, or what stands before the choices."""
    texts = [_text(one) for one in asked]
    if not texts:
        return ""
    shortest, longest = min(texts), max(texts)
    end = next((at for at, letter in enumerate(shortest) if longest[at] != letter), len(shortest))
    return shortest[:end]


def _text(asked: Mapping[str, Any]) -> str:
    messages = asked.get("messages")
    return str(asked.get("prompt", "")) if not messages else json.dumps(messages, ensure_ascii=False, indent=1)

"""The answers of two configurations to the same prompts, side by side."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from flexgen_helm.errors import FlexGenError
from flexgen_helm.reports.answers import KEY_COLUMNS, Answers
from flexgen_helm.reports.reading import Key, first_difference

SIDES = ("_before", "_after")
PAIRED_COLUMNS = ("score", "logprob", "answer", "answer_logprob", "tokens", "parsable")
"""Columns that a join has twice: of the baseline, and of the candidate."""

LACKING = {"baseline": "right_only", "candidate": "left_only"}
"""What pandas calls rows that a side lacks."""


class NotComparable(FlexGenError):
    """Runs that cannot be compared: other run entries, other prompts, nothing in common."""


@dataclass(frozen=True)
class Joined:
    """Pairs of rows."""

    rows: pd.DataFrame
    """Columns that both sides share, and each of `PAIRED_COLUMNS` with ``_before`` (baseline) and ``_after`` (candidate)."""
    missing: pd.DataFrame
    """By ``scenario`` and ``perturbation``: ``baseline`` and ``candidate``, how many rows that count this side lacks."""
    left_out: tuple[str, ...]
    """Run entries that one side lacks and that were left out as wished."""


def join(baseline: Answers, candidate: Answers, *, common_runs: bool = False) -> Joined:
    """Join on run entry, instance, perturbation, train trial and window.

    Args:
        baseline: Before.
        candidate: After.
        common_runs: Whether run entries that one side lacks are left out; else they are an error.

    Raises:
        NotComparable: One side lacks a run entry, requests differ (of a row, or in number), or no row is on both sides.
    """
    left_out = _check_runs(baseline, candidate, common_runs=common_runs)
    keys = list(KEY_COLUMNS)
    before = baseline.rows[[*keys, "split", "correct", "counts", "cluster", "prompt", *PAIRED_COLUMNS]]
    after = candidate.rows[[*keys, "counts", "prompt", *PAIRED_COLUMNS]]
    outer = before.merge(after, on=keys, how="outer", suffixes=SIDES, indicator=True, validate="one_to_one")
    outer = outer[~outer["scenario"].isin(left_out)]
    both = outer[outer["_merge"] == "both"]
    if both.empty:
        raise NotComparable(
            f"The runs of `{baseline.name}` and `{candidate.name}` have no instance in common. Evaluate both on the same suite "
            "with the same --max-eval-instances."
        )
    differing = both[both["prompt_before"] != both["prompt_after"]]
    if not differing.empty:
        raise NotComparable(_explain(differing, baseline, candidate))
    rows = both.drop(columns=["_merge", "prompt_after", "counts_after"])
    rows = rows.rename(columns={"prompt_before": "prompt", "counts_before": "counts"})
    rows["counts"] = rows["counts"].astype(bool)
    return Joined(rows.reset_index(drop=True), _count_missing(outer), left_out)


def _check_runs(baseline: Answers, candidate: Answers, *, common_runs: bool) -> tuple[str, ...]:
    left_out: set[str] = set()
    for side, other in ((baseline, candidate), (candidate, baseline)):
        names = other.runs.keys() - side.runs.keys()
        left_out |= names
        if names and not common_runs:
            shown = ", ".join(f"`{name}`" for name in sorted(names)[:3]) + (
                f" and {len(names) - 3} more" if len(names) > 3 else ""
            )
            raise NotComparable(
                f"`{side.deployment}` has no run {shown}, which `{other.deployment}` has. Run it, or compare only what both "
                "have with --common-runs."
            )
    return tuple(sorted(left_out))


def _count_missing(outer: pd.DataFrame) -> pd.DataFrame:
    counts = outer["counts_before"].eq(True) | outer["counts_after"].eq(True)
    places = [outer["scenario"], outer["perturbation"]]
    lacking = {side: (counts & (outer["_merge"] == only)) for side, only in LACKING.items()}
    return pd.DataFrame({side: rows.groupby(places).sum() for side, rows in lacking.items()}).astype(int)


def _explain(differing: pd.DataFrame, baseline: Answers, candidate: Answers) -> str:
    first = differing.iloc[0]
    scenario = str(first["scenario"])
    key = Key(*(first[name] for name in Key._fields))
    sides = [answers.texts(scenario).get(key, []) for answers in (baseline, candidate)]
    found = [first_difference(one, other) for one, other in zip(*sides, strict=False)]
    what = next(filter(None, found), f"{len(sides[0])} and {len(sides[1])} requests were sent")
    return (
        f"`{candidate.name}` was asked something else than `{baseline.name}` in {len(differing):,} rows. The first is instance "
        f"{key.instance} of `{scenario}`: {what}. Evaluate both with the same tokenizer, context, run entries and data."
    )

"""Scores and work as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexgen_helm.evaluation.scores import Score, Work

HEADER = ("run entry", "metric", "score", "instances", "requests", "prompt tokens")


def render_scores(scores: Sequence[Score]) -> str:
    """Return a table with one line for each run, and their mean where all have the same metric."""
    rows = [_row(score) for score in scores]
    values = [score.value for score in scores if score.value is not None]
    if len(values) > 1 and len({score.metric for score in scores}) == 1:
        counts = [sum(column) for column in zip(*((s.instances, s.requests, s.prompt_tokens) for s in scores), strict=True)]
        rows.append((f"mean of {len(values)}", str(scores[0].metric), f"{sum(values) / len(values):.3f}", *map(_count, counts)))
    return align([HEADER, *rows], left=(0, 1))


def _row(score: Score) -> tuple[str, ...]:
    value = "-" if score.value is None else f"{score.value:.3f}"
    return score.run, score.metric or "-", value, *map(_count, (score.instances, score.requests, score.prompt_tokens))


def _count(number: int) -> str:
    return f"{number:,}"


def align(rows: Sequence[Sequence[str]], *, left: Sequence[int]) -> str:
    """Return cells as text, the columns of some numbers to the left, others to the right."""
    columns = []
    for at, cells in enumerate(zip(*rows, strict=True)):
        width = max(map(len, cells))
        columns.append([cell.ljust(width) if at in left else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def render_work(work: Work) -> str:
    """Return a line on the work, and one on what would make it shorter where that is known."""
    rate = work.requests_per_second
    if rate is None:
        return f"All {work.requests:,} requests were answered before."
    saved = work.prompt_tokens_asked / max(work.prompt_tokens_computed, 1)
    before = f" ({work.answered_before:,} more were answered before)" if work.answered_before else ""
    advice = f"\nMost time went into {work.bound_by}. What helps: {work.what_would_help}." if work.bound_by else ""
    return (
        f"{work.requests - work.answered_before:,} requests in {work.seconds:.0f} s, {rate:.2f} requests/s{before}. "
        f"Prompt tokens: {work.prompt_tokens_asked:,} asked, {work.prompt_tokens_computed:,} computed "
        f"({saved:.1f} times fewer, because shared prefixes are computed once).{advice}"
    )

"""The table of predicted and measured figures, what it comes to, and its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from scipy.stats import spearmanr

from flexgen_helm.memory.amounts import gib
from flexgen_helm.runs.policy_validation.measuring import Outcome
from flexgen_helm.runs.policy_validation.peaks import MIB, Peaks

CLOSE = 1.1
"""Most that is predicted over what is measured, of memory."""
HEADER = (
    "policy",
    "predicted s",
    "measured s",
    "processor predicted",
    "measured",
    "error",
    "by",
    "binds",
    "disk s predicted / measured",
    "peak predicted / measured",
    "discarded",
)


class Summary(NamedTuple):
    """What all lines come to.

    Attributes:
        median_error: Median of the errors without their signs.
        worst_error: Largest of them.
        rank_correlation: Spearman's, of predicted and measured seconds; NaN for fewer than three lines.
        median_wall_error: As `median_error`, by the clock on the wall for every line.
        by_processor: Lines that are compared by processor time.
        discarded: Runs that do not count.
    """

    median_error: float
    worst_error: float
    rank_correlation: float
    median_wall_error: float
    by_processor: int
    discarded: int


def summary(outcomes: Sequence[Outcome]) -> Summary:
    """Sum up."""
    errors = [abs(outcome.error) for outcome in outcomes]
    predicted, measured = zip(*(outcome.decisive for outcome in outcomes), strict=True)
    rank = float(spearmanr(predicted, measured).statistic) if len(outcomes) > 2 else float("nan")
    wall = median(abs(outcome.predicted_seconds / outcome.measured_seconds - 1) for outcome in outcomes)
    changed = sum(not outcome.steady for outcome in outcomes)
    return Summary(median(errors), max(errors), rank, wall, changed, sum(outcome.discarded for outcome in outcomes))


def header() -> str:
    """Return the first two lines of the table, in Markdown."""
    return f"{row(HEADER)}\n{'|---' * len(HEADER)}|"


def in_words(outcomes: Sequence[Outcome]) -> str:
    """Return the summary as a sentence."""
    found = summary(outcomes)
    return (
        f"error: {found.median_error:.1%} on the median, {found.worst_error:.1%} at worst; rank correlation "
        f"{found.rank_correlation:.3f}; by the clock on the wall {found.median_wall_error:.1%} on the median; "
        f"{found.discarded} runs discarded, {found.by_processor} of {len(outcomes)} policies by processor time"
    )


def row(texts: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(texts)} |"


def cells(outcome: Outcome) -> list[str]:
    """Return the cells of a line."""
    disk = (busy.get("disk_read", 0.0) for busy in (outcome.predicted_busy, outcome.measured_busy))
    return [
        outcome.name,
        *(f"{seconds:.2f}" for seconds in (outcome.predicted_seconds, outcome.measured_seconds)),
        *(f"{seconds:.2f}" for seconds in (outcome.predicted_processor, outcome.measured_processor)),
        f"{outcome.error:+.1%}",
        "clock" if outcome.steady else "processor",
        outcome.binding,
        " / ".join(f"{seconds:.2f}" for seconds in disk),
        peaks_text(outcome.peaks),
        str(outcome.discarded),
    ]


def peaks_text(peaks: Peaks) -> str:
    """Return predicted and measured peaks by tier, in words."""
    return ", ".join(
        f"{tier} {gib(count)} / {gib(peaks.measured.get(tier, 0))}"
        for tier, count in peaks.predicted.items()
        if count or peaks.measured.get(tier)
    )


def are_close(peaks: Peaks) -> bool:
    """Return whether no tier holds more than was predicted, nor less than that by more than a tenth."""
    return all(
        peaks.measured.get(tier, 0) <= count <= CLOSE * peaks.measured.get(tier, 0) for tier, count in peaks.predicted.items()
    )


def peaks_table(found: Mapping[str, Peaks]) -> str:
    """Return the peaks of policies as a table in Markdown."""
    lines = [row(("policy", "tier", "predicted MiB", "measured MiB", "predicted / measured")), f"{'|---' * 5}|"]
    for name, (predicted, measured) in found.items():
        for tier, count in predicted.items():
            if held := measured.get(tier, 0):
                lines.append(row((name, tier, f"{count / MIB:.1f}", f"{held / MIB:.1f}", f"{count / held:.3f}")))
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw predicted against measured seconds, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    for outcome in outcomes:
        predicted, measured = outcome.decisive
        axes.loglog(measured, predicted, "o")
        axes.annotate(outcome.name, (measured, predicted), fontsize="small")
    seconds = [value for outcome in outcomes for value in outcome.decisive]
    axes.loglog([min(seconds), max(seconds)], [min(seconds), max(seconds)], "k:")
    axes.set_xlabel("measured seconds")
    axes.set_ylabel("predicted seconds")
    figure.savefig(file)

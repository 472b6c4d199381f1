"""Run entries that both sides answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A run entry of HELM."""

    run_entry: str
    instances: int
    share_aimed_at: float | None = None
    """Share of the token ratio that the time ratio should reach; None where more than prompts counts, or without an aim."""
    ratio_aimed_at: float | None = None
    endless: bool = False
    """Whether the model is given no end token, so that both sides generate as many tokens as asked."""


ENTRIES = {
    "anatomy": Entry("mmlu:subject=anatomy,method=multiple_choice_joint", 100, share_aimed_at=0.85),
    "us_foreign_policy": Entry("mmlu:subject=us_foreign_policy,method=multiple_choice_joint", 100, share_aimed_at=0.85),
    "50_tokens": Entry("synthetic_reasoning:mode=pattern_match,stop=none", 64, ratio_aimed_at=6.0, endless=True),
    "synthetic_reasoning": Entry("synthetic_reasoning:mode=pattern_match", 64, ratio_aimed_at=6.0),
    "hellaswag": Entry("commonsense:dataset=hellaswag,method=multiple_choice_separate_original", 50),
    "piqa": Entry("commonsense:dataset=piqa,method=multiple_choice_separate_original", 100),
}
"""``50_tokens`` is synthetic reasoning without its end of line, at which some answers end early."""

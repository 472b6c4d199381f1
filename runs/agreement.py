"""How many answers of two sides are the same, and whether those that differ do so at a tie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Prompts = list[list[int]]
TIE = 2e-4
"""Nats between the two best tokens below which float32 cannot tell them apart (docs/architecture.md, level C)."""


@dataclass(frozen=True)
class Agreement:
    """How many answers of the same prompts are the same."""

    equal: int
    ties: int
    """Answers whose first difference is a tie: the two best tokens were closer than `TIE`."""
    other: int
    """Answers that differ for another reason."""
    smallest_gap: float
    """Between the two best tokens where one of those compared was chosen, in nats."""

    @property
    def compared(self) -> int:
        """How many answers."""
        return self.equal + self.ties + self.other


def compare(theirs: Prompts, ours: Prompts, gaps: Sequence[Sequence[float]]) -> Agreement:
    """Compare the new tokens of the same prompts.

    Args:
        theirs: Tokens for the first prompts.
        ours: Tokens for all prompts.
        gaps: Differences between the two best tokens where each of ``ours`` was chosen.
    """
    equal = ties = other = 0
    smallest = float("inf")
    for their, our, gap in zip(theirs, ours, gaps, strict=False):
        parted = next((i for i, (x, y) in enumerate(zip(their, our, strict=False)) if x != y), None)
        smallest = min([smallest, *gap[: None if parted is None else parted + 1]])
        if their == our:
            equal += 1
        elif parted is not None and gap[parted] < TIE:
            ties += 1
        else:
            other += 1
    return Agreement(equal, ties, other, smallest)

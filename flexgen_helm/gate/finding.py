"""What a gate's function returns; the gate's name and the configuration are added by its caller."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_helm.statistics.margins import Verdict as Word


@dataclass(frozen=True)
class Finding:
    """A verdict without the gate's name."""

    word: Word
    value: float | None
    reason: str
    threshold: float | None = None
    effect: float | None = None

    @classmethod
    def undecided(cls, reason: str, value: float | None = None, *, threshold: float | None = None) -> Finding:
        """Make an inconclusive one.

        Args:
            reason: Why, in one sentence.
            value: What was measured all the same.
            threshold: What it would be compared with.
        """
        return cls("inconclusive", value, reason, threshold)

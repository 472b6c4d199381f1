"""Answers that changed between right and wrong, and whether more of them were lost than chance explains.

Of pairs that differ, half are lost and half gained where nothing got worse. So the test is exact for any number of pairs, but
it takes pairs for independent: where flips come in clusters it is too sure, and `paired_difference` holds. Sources: McNemar,
Psychometrika 12 (1947); pooling over tasks as in When LLMs get significantly worse (arXiv 2602.10144); flips both ways as in
Accuracy is not all you need (arXiv 2407.09141).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from flexgen_helm.statistics.arrays import checked_pairs


@dataclass(frozen=True)
class Flips:
    """Pairs that changed for the worse and for the better."""

    lost: int
    """Right before, wrong after; or, of a sign test, a lower score."""
    gained: int
    """Wrong before, right after; or a higher score."""
    num: int
    """All pairs, changed or not."""

    @property
    def p_value(self) -> float:
        """Probability of a split at least as uneven, either way, if nothing changed; 1 without a changed pair."""
        changed = self.lost + self.gained
        return min(1.0, 2 * float(special.bdtr(min(self.lost, self.gained), changed, 0.5)))

    @property
    def p_worse(self) -> float:
        """Probability of at least as many lost ones among those that changed, if nothing got worse; for gates."""
        return float(special.bdtrc(self.lost - 1, self.lost + self.gained, 0.5))

    @property
    def disagreement_rate(self) -> float:
        """Share of the pairs that changed, either way."""
        return (self.lost + self.gained) / self.num


def flips(before: ArrayLike, after: ArrayLike) -> Flips:
    """Count flips of right and wrong answers; the p values are those of the exact McNemar test.

    Args:
        before: Whether the baseline was right, ``[N]``: truth values, or 0 and 1.
        after: The same instances in the same order, ``[N]``.

    Raises:
        ValueError: For no pairs, unequal lengths, NaN, or a score that is neither 0 nor 1 (`sign_test` takes those).
    """
    first, second = checked_pairs(before, after)
    between = ((first != 0) & (first != 1)) | ((second != 0) & (second != 1))
    if between.any():
        raise ValueError(f"{int(between.sum())} of {len(first)} pairs have a score other than 0 and 1. Use sign_test for them.")
    return sign_test(first, second)


def sign_test(before: ArrayLike, after: ArrayLike) -> Flips:
    """Count pairs of which any score (F1, a share) fell or rose; the p values are those of the sign test.

    By how much a score changed counts for nothing, and pairs of equal scores count neither way. For scores of 0 and 1 this is
    the exact McNemar test.

    Args:
        before: Scores of the baseline, ``[N]``.
        after: The same instances in the same order, ``[N]``.

    Raises:
        ValueError: For no pairs, unequal lengths, NaN or infinity.
    """
    first, second = checked_pairs(before, after)
    return Flips(int(np.sum(second < first)), int(np.sum(second > first)), len(first))


def pooled(tasks: Iterable[Flips]) -> Flips:
    """Add up the flips of several tasks, so that small losses in all of them are seen together.

    Raises:
        ValueError: If there is no task.
    """
    found = list(tasks)
    if not found:
        raise ValueError("There are no tasks to pool.")
    return Flips(sum(x.lost for x in found), sum(x.gained for x in found), sum(x.num for x in found))

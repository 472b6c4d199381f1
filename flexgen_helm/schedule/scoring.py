"""Scoring work that waits, and which of it makes the next block.

Work that needs K and V only in the sweep that computes it is bounded by the block's tokens alone. Prompts are taken whole, in
the order of the prefix tree. A block ends where the next prompt shares least with the last one, since what they share is
computed again in the next block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from flexgen_helm.schedule.tree import common_prefix_length
from flexgen_helm.schedule.work import PromptWork

CUT_FROM = 0.75
"""A block is cut where neighbours share least, in the last quarter of its tokens."""


class ScoringBlock(NamedTuple):
    """Scoring work taken from the queue."""

    works: list[PromptWork]
    """To be computed."""
    answered: list[PromptWork]
    """Work of which everything was computed as a part of other prompts, since it came in."""


class ScoringQueue:
    """Scoring work in the order in which it is computed."""

    def __init__(self, reserve: Callable[[PromptWork], bool]) -> None:
        """Hold nothing yet.

        Args:
            reserve: Called for each prompt before it is taken; returns whether there is memory for what it leaves behind.
        """
        self._reserve = reserve
        self._works: deque[PromptWork] = deque()

    def __bool__(self) -> bool:
        return bool(self._works)

    def __iter__(self) -> Iterator[PromptWork]:
        return iter(self._works)

    def extend(self, works: Iterable[PromptWork]) -> None:
        """Take work in, in the order of the prefix tree."""
        self._works.extend(works)

    def clear(self) -> None:
        """Forget all work."""
        self._works.clear()

    def take(self, budget: int, *, alone: bool) -> ScoringBlock:
        """Take work for one sweep.

        Args:
            budget: Tokens to compute; what neighbours share counts once.
            alone: Whether nothing else is in the sweep; then one prompt is taken even if it is longer than the budget.
        """
        block: list[PromptWork] = []
        answered: list[PromptWork] = []
        shared: list[int] = []
        cost: list[int] = [0]
        while self._works and cost[-1] < budget:
            work = self._works[0]
            if work.answered():
                answered.append(self._works.popleft())
                continue
            common = common_prefix_length(block[-1].tokens, work.tokens) if block else 0
            total = cost[-1] + len(work.tokens) - common
            if (total > budget and (block or not alone)) or not self._reserve(work):
                break
            block.append(self._works.popleft())
            shared.append(common)
            cost.append(total)
        cut = self._cut(block, shared, cost, budget) if self._works else len(block)
        self._works.extendleft(reversed(block[cut:]))
        return ScoringBlock(block[:cut], answered)

    def _cut(self, block: list[PromptWork], shared: list[int], cost: list[int], budget: int) -> int:
        """Return where to end a full block: at its end, or earlier in its last quarter if neighbours share less there."""
        best, least = len(block), common_prefix_length(block[-1].tokens, self._works[0].tokens) if block else 0
        for i in range(len(block) - 1, 0, -1):
            if cost[i] < CUT_FROM * budget:
                break
            if shared[i] < least:
                best, least = i, shared[i]
        return best

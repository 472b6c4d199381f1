"""A prompt with everything that is asked of it, and what every scheduler does with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flexgen_helm.schedule.rows import Continuation, Sweep
from flexgen_helm.schedule.tree import Node


@dataclass(eq=False)
class PromptWork:
    """A distinct prompt with everything that is asked of it."""

    tokens: tuple[int, ...]
    score: bool
    continuations: list[Continuation]
    node: Node = field(init=False)

    @property
    def limits(self) -> list[int]:
        """New tokens of each completion, at most."""
        return [continuation.max_new_tokens for continuation in self.continuations]

    @property
    def generating(self) -> bool:
        """Whether something of the prompt must outlive the sweep in which it is computed."""
        return any(continuation.max_new_tokens > 1 for continuation in self.continuations)

    @property
    def finite(self) -> bool:
        """Whether the prompt's K and V were finite numbers, as far as they were computed."""
        return all(node.finite for node in self.node.path())

    def scored(self) -> bool:
        """Whether nothing is left to ask of the prompt itself."""
        if not self.score:
            return True
        found = [(node.start, node.scores) for node in self.node.path()]
        return all(scores is None or None not in scores.logprobs[start == 0 :] for start, scores in found)

    def answered(self) -> bool:
        """Whether nothing is left to ask of the prompt nor of its completions."""
        return self.scored() and all(continuation.done for continuation in self.continuations)


class Scheduler(Protocol):
    """Admission and lifetimes: which prompts and completions are in the next sweep.

    Generating work goes first; scoring work fills what the block has left. What is admitted is never pre-empted.
    """

    @property
    def capacity_bytes(self) -> int:
        """Memory for what sequences carry from one sweep to the next."""

    def bytes_needed(self, length: int, limits: Sequence[int]) -> int:
        """Return what a prompt of ``length`` tokens needs of that memory, with completions of at most ``limits`` tokens."""

    def add(self, works: list[PromptWork]) -> None:
        """Take work in."""

    def has_work(self) -> bool:
        """Whether another sweep is needed."""

    def tokens_left(self) -> tuple[int, int]:
        """Prompt tokens still to be computed (what will be computed again not counted) and new tokens, at most."""

    def next_sweep(self) -> Sweep:
        """Plan one sweep: every live completion takes a step, prompts fill the block's tokens."""

    def end_sweep(self) -> list[PromptWork]:
        """Account for a sweep that was computed and whose logit requests were answered; returns the work that is complete."""

    def abandon(self) -> list[PromptWork]:
        """Drop all work after a failure; returns what was dropped."""


def decode_position(work: PromptWork, continuation: Continuation) -> int:
    """Absolute position of a completion's last token, which the next sweep computes."""
    return len(work.tokens) + len(continuation.tokens) - 1

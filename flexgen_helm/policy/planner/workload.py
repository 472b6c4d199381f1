"""Workload: what is asked of an engine, as the planner sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt and what is asked of it.

    Attributes:
        tokens: Token ids; only which prefixes are equal matters.
        new_tokens: Expected new tokens of each completion; none: the prompt is only scored.
        score: Whether log-probabilities of the prompt's tokens are needed.
    """

    tokens: tuple[int, ...]
    new_tokens: tuple[int, ...] = ()
    score: bool = False


@dataclass(frozen=True)
class Workload:
    """Distinct prompts, in any order."""

    prompts: tuple[PlannedPrompt, ...]

    @classmethod
    def of(cls, prompts: Iterable[PlannedPrompt]) -> Workload:
        """Return a workload of prompts of which some may be equal: what is asked of these is put together."""
        found: dict[tuple[int, ...], PlannedPrompt] = {}
        for each in prompts:
            known = found.get(each.tokens, PlannedPrompt(each.tokens))
            found[each.tokens] = PlannedPrompt(each.tokens, known.new_tokens + each.new_tokens, known.score or each.score)
        return cls(tuple(found.values()))

    @classmethod
    def uniform(cls, num_jobs: int, prompt_len: int, gen_len: int, *, shared_prefix: int = 0, score: bool = False) -> Workload:
        """Return jobs of equal sizes.

        Args:
            num_jobs: Number of jobs.
            prompt_len: Tokens of each prompt.
            gen_len: New tokens of each; 0: it is only scored.
            shared_prefix: First tokens that all prompts have in common.
            score: Whether log-probabilities of prompt tokens are needed.
        """
        prefix = (0,) * shared_prefix
        prompts = (
            PlannedPrompt((*prefix, *range(1 + i, 1 + i + prompt_len - shared_prefix)), (gen_len,) if gen_len else (), score)
            for i in range(0, num_jobs * prompt_len, prompt_len)
        )
        return cls(tuple(prompts))

"""Whether prompts that do not fill a row are computed now or wait for others."""

from __future__ import annotations


class PromptGate:
    """Decides how many prompt tokens are computed in a sweep.

    A row costs the same however few tokens are in it. While more prompts wait for memory, those that do not fill a row wait
    for what finished sequences make room for, until their idle slots have cost as much as the padding would: never more than
    twice as bad as what turns out best.
    """

    def __init__(self, *, row_tokens: int, block_tokens: int, row_cost: float) -> None:
        """Hold nothing back yet.

        Args:
            row_tokens: Tokens of a row.
            block_tokens: Prompt tokens of a sweep, at most.
            row_cost: Time of a row of prompts in units of a sweep that only decodes; 0: nothing is held back.
        """
        self.block_tokens = block_tokens
        """Prompt tokens of a sweep, at most."""
        self._row_tokens, self._row_cost = row_tokens, row_cost
        self._idle_share = 0.0
        """Share of the slots that prompts which wait for their row have left idle, summed over sweeps."""

    def let_in(self, missing: int, *, filling: int, decoding: int, more_wait: bool) -> int:
        """Return how many of the missing prompt tokens are computed in the next sweep.

        Args:
            missing: Tokens that are missing of all prompts that have memory.
            filling: Completions that these prompts hold slots for.
            decoding: Completions that take a step in the sweep.
            more_wait: Whether prompts wait for memory and nothing else could fill the row.
        """
        if missing >= self.block_tokens:
            return self.block_tokens
        rest = missing % self._row_tokens
        if not (rest and more_wait and decoding):
            self._idle_share = 0.0
            return missing
        idle = rest / missing * filling
        self._idle_share += idle / (idle + decoding)
        if self._idle_share < self._row_cost * (1 - rest / self._row_tokens):
            return missing - rest
        self._idle_share = 0.0
        return missing

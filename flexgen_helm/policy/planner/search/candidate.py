"""Candidate: the integers for which the linear programme is solved, and the sweeps that they lead to. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flexgen_helm.policy.planner.search.features import Features
from flexgen_helm.types import ON_DEVICE, Policy, ResolvedPolicy, Shares

SweepKind = Literal["prompt", "decode"]
"""Whether a sweep computes prompts, beside what decodes, or only decodes."""


@dataclass(frozen=True)
class Candidate:
    """Integers of a policy, the place of attention, and the tiers that may be used.

    Attributes:
        policy: Row sizes, block and prefetch; its shares are not looked at.
        live: Most sequences that decode at a time: no more than its rows hold, fewer where memory is meant to hold fewer.
        weights: For device, host and disk 1 where weights may be, else 0.
        cache: The same for K and V.
        hidden: The same for hidden states between two layers.
    """

    policy: ResolvedPolicy
    live: int
    weights: Shares
    cache: Shares
    hidden: Shares = ON_DEVICE


@dataclass(frozen=True)
class Sweeps:
    """Sweeps of a run. A sweep is one pass over the layers by all that is live.

    Attributes:
        prompt: Sweeps that compute prompts, beside what decodes.
        decode: Sweeps that only decode.
        tokens: Prompt tokens of a sweep that computes prompts.
        live: Sequences that decode in a sweep, on average.
        context: Tokens to which each of them attends, on average.
        to_first: Sweeps until the first completion is answered, less the one that computes its prompt.
        first_prompts: How many of these compute prompts, that one included.
    """

    prompt: int
    decode: int
    tokens: float
    live: float
    context: float
    to_first: int
    first_prompts: int

    @classmethod
    def of(cls, features: Features, live: int, block_tokens: int) -> Sweeps:
        """Count the sweeps in which prompts ride along (peers.md section 4; FlexGen computes a block's prompts apart).

        Sequences enter in groups of as many as the block's tokens hold, and leave in the same groups. So N sequences, of which
        B are live, take N / B rounds of as many sweeps as each has tokens, and the last groups some more.

        Args:
            features: The workload.
            live: Most sequences that decode at a time, B.
            block_tokens: Most prompt tokens of a sweep.
        """
        prompt = math.ceil(features.prompt_tokens / block_tokens)
        if not features.sequences:
            return cls(prompt, 0, features.prompt_tokens / max(1, prompt), 0.0, 0.0, 0, 1)
        count = features.sequences
        sweeps_each = features.steps / count + 1
        group = min(live, max(1.0, block_tokens * count / max(1, features.kept_tokens)))
        if group * sweeps_each <= live:  # prompts bind: a group enters in each sweep
            sweeps = count / group + features.longest
        else:
            rounds = math.ceil(count / live) - 1
            sweeps = rounds * sweeps_each + math.ceil((count - rounds * live) / group) + features.longest
        prompt = max(prompt, math.ceil(count / group - 1e-9))
        total = max(prompt, math.ceil(sweeps))
        first = min(prompt, math.ceil(min(count, live) / group), 1 + features.longest)
        mean = features.prompt_tokens / prompt, features.steps / total, features.context
        return cls(prompt, total - prompt, *mean, features.longest, first)

    @property
    def counts(self) -> dict[SweepKind, int]:
        """Sweeps of a run by kind."""
        return {"prompt": self.prompt, "decode": self.decode}

    @property
    def first_counts(self) -> dict[SweepKind, int]:
        """Sweeps by kind until the first job is answered."""
        return {"prompt": self.first_prompts, "decode": 1 + self.to_first - self.first_prompts}

    @property
    def total(self) -> int:
        """All sweeps."""
        return self.prompt + self.decode


def candidate_of(policy: ResolvedPolicy) -> Candidate:
    """Return a candidate for a policy of which only sizes matter."""
    return Candidate(policy, policy.block_size, ON_DEVICE, ON_DEVICE)


def with_shares(candidate: Candidate, weights: Shares | None, cache: Shares, hidden: Shares) -> ResolvedPolicy:
    """Return a candidate's policy with shares."""
    fields = {name: getattr(candidate.policy, name) for name in Policy.__dataclass_fields__}
    return ResolvedPolicy(**{**fields, "weights": weights, "cache": cache, "hidden": hidden})

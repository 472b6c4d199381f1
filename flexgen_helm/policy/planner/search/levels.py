"""Levels: how many sequences decode in the sweeps of a run, from its first to its last. No torch.

A block fills and drains, so the sweeps of a run differ. Each takes as long as its busiest resource, and the mean of the longest
times is longer than the longest of the mean times (Jensen): with few sequences another resource binds than with many. The
closed form of `candidate` knows the mean sweep of each kind only, which bounds a run from below.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, get_args

from flexgen_helm.policy.planner.search.candidate import SweepKind, Sweeps
from flexgen_helm.policy.planner.search.features import Features
from flexgen_helm.schedule.prompt_gate import PromptGate

MOST_ROUNDS = 6
"""Rounds of a full block that are walked through; those of longer runs are like these."""
MOST_LEVELS = 8
"""Most levels of each kind of sweep."""
LEAST = 1e-6
"""Sequences and tokens that count as none, since sums of floats differ by as much."""


@dataclass(frozen=True)
class Level:
    """Sweeps that are alike.

    Attributes:
        kind: Whether they compute prompts.
        count: How many there are.
        first: How many of these come before the first job is answered.
        sweeps: The run's sweeps, with the prompt tokens, live sequences and context of these.
    """

    kind: SweepKind
    count: float
    first: int
    sweeps: Sweeps


class _Walked(NamedTuple):
    """A sweep.

    Attributes:
        number: Its number, from 0 on.
        tokens: Prompt tokens that it computes.
        live: Sequences that decode.
        read: Tokens to which they attend.
    """

    number: int
    tokens: float
    live: float
    read: float


def levels(sweeps: Sweeps, features: Features, live: int, gate: PromptGate) -> list[Level]:
    """Return the sweeps of a run by how many sequences decode in them.

    Args:
        sweeps: The run's sweeps, by the closed form.
        features: The workload.
        live: Most sequences that are in a block at a time.
        gate: Decides how many prompt tokens a sweep computes, as it does for the scheduler.
    """
    if not features.sequences:
        return [Level("prompt", sweeps.prompt, 1, sweeps)]
    longer = max(1.0, features.sequences / (MOST_ROUNDS * live))
    walked = list(_Walk(features, live, gate, longer))
    found: list[Level] = []
    for kind in get_args(SweepKind):
        of_kind = [each for each in walked if (each.tokens > 0) == (kind == "prompt")]
        for part in _parts(sorted(of_kind, key=lambda each: (each.live, each.tokens))):
            _, tokens, decoding, read = (sum(values) / len(part) for values in zip(*part, strict=True))
            context = read / decoding if decoding else features.context
            level = replace(sweeps, tokens=tokens, live=decoding, context=context)
            first = sum(each.number <= features.shortest for each in part)
            found.append(Level(kind, longer * len(part), first, level))
    return found


class _Walk:
    """Goes from sweep to sweep as `flexgen_helm.schedule.packed` does, with prompts of mean length.

    Sequences get their place in the block as long as the prompts that have one do not fill a sweep; the gate says how many of
    their tokens are computed, and what is only scored fills the rest of the sweep. Of the sequences that enter, a part has each
    number of steps.
    """

    def __init__(self, features: Features, live: float, gate: PromptGate, longer: float) -> None:
        """Begin before the first sweep.

        Args:
            features: The workload.
            live: Most sequences in the block.
            gate: See `levels`.
            longer: How many times as much there is of everything.
        """
        self._features, self._live, self._gate = features, live, gate
        self._tokens_each = max(1.0, features.kept_tokens / features.sequences)
        self._waiting = math.ceil(features.sequences / longer)
        self._scoring = (features.prompt_tokens - features.kept_tokens) / longer
        self._filling = 0
        """Sequences that have their place and whose prompt is not computed to its end."""
        self._begun = self._decoding = self._ages = 0.0
        self._ending: dict[int, list[tuple[float, int]]] = defaultdict(list)
        """By the number of a sweep before which they are gone: sequences, and their steps."""

    def __iter__(self) -> Iterator[_Walked]:
        """Yield sweep by sweep."""
        first = self._features.context - self._features.mean_age  # tokens to which a sequence's first step attends
        number = 0
        while self._waiting + self._filling + self._decoding > LEAST or self._scoring > LEAST:
            tokens = self._tokens()
            self._begun += tokens
            entering = min(self._filling, math.floor(self._begun / self._tokens_each + LEAST))
            self._begun = max(0.0, self._begun - entering * self._tokens_each)
            scored = min(self._scoring, self._gate.block_tokens - tokens)
            yield _Walked(number, tokens + scored, self._decoding, self._decoding * first + self._ages)
            self._filling, self._scoring = self._filling - entering, self._scoring - scored
            number += 1
            self._step(number, entering)

    def _tokens(self) -> float:
        """Let sequences in, and return how many tokens of their prompts are computed."""
        each, most = self._tokens_each, self._gate.block_tokens
        places = math.floor(self._live - self._decoding + LEAST) - self._filling
        prompts = math.ceil((most + self._begun) / each - LEAST) - self._filling  # of which the last one may not fit whole
        entering = max(0, min(self._waiting, places, prompts))
        self._filling, self._waiting = self._filling + entering, self._waiting - entering
        missing = self._filling * each - self._begun
        if missing < LEAST:
            return 0.0
        let_in = self._gate.let_in(
            math.ceil(missing - LEAST),
            filling=self._filling,
            decoding=math.ceil(self._decoding - LEAST),
            more_wait=self._waiting > 0 and self._scoring <= LEAST,
        )
        return min(missing, float(let_in))

    def _step(self, number: int, entering: int) -> None:
        """Let those that have decoded a sweep leave, or grow older, and those whose prompt was computed begin."""
        self._ages += self._decoding
        for share, steps in self._features.step_shares:
            self._ending[number + steps].append((share * entering, steps))
        self._decoding += entering
        for size, steps in self._ending.pop(number, ()):
            self._decoding, self._ages = self._decoding - size, self._ages - size * steps


def _parts(walked: Sequence[_Walked]) -> Iterator[Sequence[_Walked]]:
    """Cut sweeps into parts of about equal numbers, in order."""
    number = min(MOST_LEVELS, len(walked))
    yield from (walked[begin:end] for begin, end in pairwise(len(walked) * i // max(1, number) for i in range(number + 1)))

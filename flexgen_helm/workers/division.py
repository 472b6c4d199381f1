"""Divides jobs among workers: prompts that share a beginning stay together, and each worker gets about as many tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from flexgen_helm.types import Job

CHARACTERS = 4
"""Of a token, on the average. Only ratios matter, and a tokenizer would take minutes for a long suite."""
SLACK = 1.05
"""So much longer than necessary may the longest share be, if that keeps longer prefixes together."""


@dataclass(frozen=True)
class _Group:
    """The jobs of one prompt, which is computed once for them."""

    text: str
    jobs: list[int]
    new_tokens: int

    @property
    def alone(self) -> float:
        """Tokens to compute where nothing of the prompt is known."""
        return len(self.text) / CHARACTERS + self.new_tokens


def divide(jobs: Sequence[Job], most: int) -> list[list[int]]:
    """Return which jobs each worker gets.

    Prompts are put in alphabetical order, in which those that share a beginning are neighbours, and cut into pieces of
    consecutive ones. A piece costs the characters that its prefix tree holds and the tokens that it generates. Of all
    such divisions, the costliest piece is about the cheapest possible; cuts are where neighbours share least.

    Args:
        jobs: The jobs.
        most: Most workers.

    Returns:
        Indices of the jobs of each worker, in order; fewer than ``most`` if there are fewer prompts, none is empty.
    """
    groups = _grouped(jobs)
    if not groups:
        return []
    shared = [0, *(_common(a.text, b.text) for a, b in pairwise(groups))]
    alone = [group.alone for group in groups]
    beside = [cost - length / CHARACTERS for cost, length in zip(alone, shared, strict=True)]
    low, high = max(alone), sum(alone)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _pieces_from(alone, beside, middle)[0] <= most else (middle, high)
    cuts = _cuts(alone, beside, shared, SLACK * high, most)
    return [sorted(job for group in groups[a:b] for job in group.jobs) for a, b in pairwise([0, *cuts, len(groups)])]


def _grouped(jobs: Sequence[Job]) -> list[_Group]:
    by_text: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        by_text.setdefault(_text(job), []).append(index)
    return [
        _Group(text, indices, sum(jobs[index].max_new_tokens * jobs[index].num_completions for index in indices))
        for text, indices in sorted(by_text.items())
    ]


def _text(job: Job) -> str:
    """Return the prompt, or in its place a text in which equal beginnings of prompts are equal."""
    if job.prompt is not None:
        return job.prompt
    if job.messages is not None:
        return json.dumps([dict(message) for message in job.messages], default=repr)
    return "".join(f"{token:<{CHARACTERS}}" for token in job.token_ids or ())


def _common(a: str, b: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _pieces_from(alone: Sequence[float], beside: Sequence[float], limit: float) -> list[int]:
    """Return for every position how many pieces of at most ``limit`` the rest needs from there on."""
    costs = [0.0, *accumulate(beside)]
    pieces, end = [0] * (len(alone) + 1), len(alone)
    for start in reversed(range(len(alone))):
        # What a piece may cost besides its first prompt.
        while end > start + 1 and alone[start] + costs[end] - costs[start + 1] > limit:
            end -= 1
        pieces[start] = 1 + pieces[end]
    return pieces


def _cuts(alone: Sequence[float], beside: Sequence[float], shared: Sequence[int], limit: float, most: int) -> list[int]:
    """Return where pieces of at most ``limit`` begin, where neighbours share least; the first is left out."""
    pieces, start = _pieces_from(alone, beside, limit), 0
    cuts: list[int] = []
    while len(cuts) + 1 < most:
        cost, places, at = alone[start], [], start + 1
        while at < len(alone) and cost <= limit:
            if pieces[at] <= most - len(cuts) - 1:
                places.append(at)
            cost, at = cost + beside[at], at + 1
        if not places or (at == len(alone) and cost <= limit):
            break
        start = min(places, key=lambda place: (shared[place], -place))
        cuts.append(start)
    return cuts

"""Mixes of jobs: ragged lengths, shared prefixes, duplicates, limits."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import strategies as st

from flexgen_helm import Job
from tests.dimensions import VOCAB_SIZE

MAX_PROMPT = 60
MAX_NEW = 12
FIRST_TOKEN = 3
"""Ids below are special tokens."""


def random_tokens(seed: int, count: int) -> list[int]:
    """Returns ``count`` token ids that are not special."""
    generator = random.Random(seed)
    return [generator.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(count)]


@dataclass(frozen=True)
class Shape:
    """One job without its tokens."""

    prefix: int
    """Which of the shared prefixes comes first."""
    own_length: int
    max_new_tokens: int
    score_prompt: bool


def build_mix(seed: int, prefix_lengths: list[int], shapes: list[Shape]) -> list[Job]:
    """Fills shapes with random tokens.

    Prefix 0 is empty and prefix 2 continues prefix 1, so that the tree branches twice. A job that generates nothing is
    scored.
    """
    parts = [random_tokens(seed + number, length) for number, length in enumerate(prefix_lengths)]
    prefixes = [[], parts[0], parts[0] + parts[1]]
    jobs = []
    for number, shape in enumerate(shapes):
        own = random_tokens(seed + 100 + number, shape.own_length)
        tokens = (prefixes[shape.prefix] + own)[:MAX_PROMPT] or random_tokens(seed, 1)
        jobs.append(
            Job(
                token_ids=tokens,
                max_new_tokens=shape.max_new_tokens,
                score_prompt=shape.score_prompt or shape.max_new_tokens == 0,
                top_logprobs=10 if shape.max_new_tokens else 0,
            )
        )
    return jobs


@st.composite
def job_mixes(draw: st.DrawFn, max_jobs: int = 8) -> list[Job]:
    """Mixes of 1 to ``max_jobs`` jobs; some prompts are equal to a prefix of others."""
    shape = st.builds(
        Shape,
        prefix=st.integers(0, 2),
        own_length=st.integers(0, MAX_PROMPT),
        max_new_tokens=st.integers(0, MAX_NEW),
        score_prompt=st.booleans(),
    )
    lengths = draw(st.lists(st.integers(1, 30), min_size=2, max_size=2))
    return build_mix(draw(st.integers(0, 2**16)), lengths, draw(st.lists(shape, min_size=1, max_size=max_jobs)))


def fixed_mix(seed: int, count: int) -> list[Job]:
    """Returns ``count`` jobs of every kind, always the same ones for a seed."""
    generator = random.Random(seed)
    shapes = [
        Shape(
            prefix=generator.randrange(3),
            own_length=generator.choice([0, 1, 2, 7, 8, 9, 17, 31, 32, 33, generator.randrange(60)]),
            max_new_tokens=generator.choice([0, 1, 2, 5, MAX_NEW]),
            score_prompt=generator.random() < 0.5,
        )
        for _ in range(count)
    ]
    return build_mix(seed, [23, 11], shapes)

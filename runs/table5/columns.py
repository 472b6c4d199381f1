"""What a variant answers, and its figures: alone, and less those of 16 bits on the same questions and tokens."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexgen_helm import Engine, Policy
from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.table5.prompts import Question, make_windows
from flexgen_helm.scenarios.last_word import begins_with_word
from flexgen_helm.statistics.arrays import Floats
from flexgen_helm.statistics.clustered import mean_with_error
from flexgen_helm.statistics.paired import paired_difference

PLAIN = "16 bits"
"""Name of the column without compression."""
BLOCK_TOKENS = 100
"""Consecutive tokens of the text that count as a cluster, because what is hard to predict stands together."""


@dataclass(frozen=True)
class Work:
    """What every column is asked."""

    questions: Sequence[Question]
    text: str
    tokens: int
    """Of the text's beginning, to be predicted."""


@dataclass(frozen=True)
class Column:
    """What a variant answered."""

    name: str
    right: Floats
    """1 where the last word is right, else 0, ``[questions]``."""
    answers: tuple[tuple[float, ...], ...]
    """Log-probabilities of the tokens of each answer."""
    losses: Floats
    """Negative log-probability of each token of the text, in nats, ``[tokens]``."""
    groups: NDArray[np.intp]
    """Cluster of each question."""
    cpu_s: float
    """Processor time of the answers, without loading."""


@dataclass(frozen=True)
class Value:
    """A figure."""

    value: float
    error: float | None
    """Standard error; None: one cluster says nothing of how clusters differ."""


@dataclass(frozen=True)
class Figures:
    """Figures of a column."""

    name: str
    accuracy: Value
    perplexity: Value
    accuracy_change: Value
    """Against 16 bits, question by question."""
    perplexity_ratio: Value
    """Over that of 16 bits, token by token."""
    cpu_s: float


def answer(model: Path, variant: str | None, work: Work) -> Column:
    """Let a variant answer everything in one run, computed in float32.

    Args:
        model: A folder.
        variant: As behind the ``@``; None: no compression.
        work: Equal for all variants.
    """
    with Engine.from_pretrained(str(model), dtype="float32", compression=variant, policy=Policy()) as engine:
        assert engine.tokenizer is not None
        windows = make_windows(engine.tokenizer, work.text, work.tokens, engine.max_length)
        begun = time.process_time()
        results = engine.run([*(question.job for question in work.questions), *windows])
        seconds = time.process_time() - begun
    completions = [result.completions[0] for result in results[: len(work.questions)]]
    scored = [result.prompt_logprobs or [] for result in results[len(work.questions) :]]
    right = [begins_with_word(each.text, question.word) for each, question in zip(completions, work.questions, strict=True)]
    return Column(
        name=variant or PLAIN,
        right=np.array(right, dtype=np.float64),
        answers=tuple(tuple(each.logprobs) for each in completions),
        losses=-np.concatenate([logprobs[1:] for logprobs in scored]),
        groups=np.array([question.group for question in work.questions]),
        cpu_s=seconds,
    )


def figures(column: Column, plain: Column) -> Figures:
    """Return the figures of a column, against that of 16 bits. Errors of ratios are to first order in those of mean losses."""
    blocks = np.arange(len(column.losses)) // BLOCK_TOKENS
    accuracy, loss = mean_with_error(column.right, column.groups), mean_with_error(column.losses, blocks)
    change = paired_difference(plain.right, column.right, column.groups)
    more = paired_difference(plain.losses, column.losses, blocks)
    return Figures(
        column.name,
        Value(accuracy.value, accuracy.standard_error),
        _exponential(loss.value, loss.standard_error),
        Value(change.difference, change.standard_error),
        _exponential(more.difference, more.standard_error),
        column.cpu_s,
    )


def _exponential(mean: float, error: float | None) -> Value:
    value = math.exp(mean)
    return Value(value, None if error is None else value * error)


def compared(first: Column, second: Column) -> str:
    """Return how many answers and log-probabilities of two columns differ.

    Raises:
        FlexGenError: If the text or the questions gave equal bits, so that they show nothing of what parts the two.
    """
    answers = sum(a != b for a, b in zip(first.answers, second.answers, strict=True))
    tokens = int((first.losses != second.losses).sum())
    for count, what in ((answers, "last words"), (tokens, "text")):
        if not count:
            raise FlexGenError(
                f"The columns {first.name} and {second.name} are equal to the last bit on the {what}, so it shows nothing of "
                "what parts them. Within its own chunk of 128 tokens a query reads K and V as they are: prompts must be longer."
            )
    flipped = int((first.right != second.right).sum())
    return (
        f"{second.name} against {first.name}: log-probabilities of {tokens:,} of {len(first.losses):,} tokens and of "
        f"{answers:,} of {len(first.answers):,} answers differ, {flipped:,} of them in being right"
    )


def check_distinct(columns: Sequence[Column]) -> None:
    """Check that no two columns are equal.

    Raises:
        FlexGenError: As in `compared`.
    """
    for first, second in itertools.combinations(columns, 2):
        compared(first, second)

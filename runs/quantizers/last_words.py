"""The last word of LAMBADA's passages, given all words before it (Paperno et al., 2016, arXiv:1606.06031).

A word counts as right if each of its tokens is the model's first choice behind the true ones before it, which is what
greedy decoding would give. Passages stand behind the end token, without any change to their text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flexgen_helm.statistics.arrays import Floats
from flexgen_helm.statistics.bootstrap import Bootstrap, Estimate
from flexgen_helm.statistics.flips import flips

MOST_ROWS = 32
"""Passages that are computed together."""


@dataclass(frozen=True)
class Passage:
    """Tokens of a passage and how many of them are its last word."""

    ids: list[int]
    """The end token first."""
    word_tokens: int


@dataclass(frozen=True)
class Answers:
    """What a model says of each last word, in the order of the passages."""

    losses: Floats
    """Negative log-likelihood of each word, in nats, ``[passages]``."""
    right: Floats
    """1 where each token of the word is the first choice, else 0, ``[passages]``."""


@dataclass(frozen=True)
class Summary:
    """What a model says of all last words."""

    passages: int
    accuracy: float
    accuracy_error: float
    """Standard error of the accuracy."""
    perplexity: float
    """Of a word."""
    perplexity_error: float
    """Standard error of the perplexity, to first order in that of the mean loss."""


@dataclass(frozen=True)
class Difference:
    """What one model says, against another one on the same passages."""

    accuracy: Estimate
    """Its accuracy less the other's."""
    gained: int
    """Words that it alone has right."""
    lost: int
    """Words that the other one alone has right."""
    p_value: float
    """Of McNemar's exact test that it gains as many words as it loses."""
    perplexity: Estimate
    """Its perplexity over the other's."""


@dataclass(frozen=True)
class LastWords:
    """What a model says of all last words, and how it differs from others."""

    summary: Summary
    from_first: Difference
    """Against the first model that was asked."""
    from_previous: Difference
    """Against the model that was asked before."""


class Quiz:
    """Asks models for the last words of the same passages."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        """Keep the passages, at least two."""
        self._passages = passages
        self._asked: list[Answers] = []

    def ask(self, model: nn.Module) -> LastWords:
        """Ask a model; the first one is compared with itself."""
        answers = answer(model, self._passages)
        self._asked.append(answers)
        differences = [compare(answers, other) for other in (self._asked[0], self._asked[-2:][0])]
        return LastWords(summarize(answers), *differences)


def split_passages(texts: Sequence[str], tokenizer: Callable[..., Any], end: int) -> list[Passage]:
    """Tokenise passages whose last word is behind their last space.

    Args:
        texts: Passages with at least two words.
        tokenizer: A byte-level one, which never joins tokens across a space.
        end: The end token.
    """
    passages = []
    for text in texts:
        before, space, word = text.strip().rpartition(" ")
        parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, space + word)]
        passages.append(Passage([end, *parts[0], *parts[1]], len(parts[1])))
    return passages


def answer(model: nn.Module, passages: Sequence[Passage]) -> Answers:
    """Let a model predict the last words.

    Passages of equal length are computed together, so that nothing is padded.

    Args:
        model: A causal language model of transformers.
        passages: In any order.
    """
    losses, right = np.empty(len(passages)), np.empty(len(passages))
    for batch in _batches(passages):
        longest = max(passages[at].word_tokens for at in batch)
        ids = torch.tensor([passages[at].ids for at in batch])
        logits: Tensor = model(ids[:, :-1], use_cache=False, logits_to_keep=longest).logits
        for at, word, found in zip(batch, ids[:, -longest:], logits.log_softmax(-1), strict=True):
            own = slice(longest - passages[at].word_tokens, None)
            losses[at] = -found[own].gather(1, word[own, None]).sum(dtype=torch.float64)
            right[at] = bool((found[own].argmax(1) == word[own]).all())
    return Answers(losses, right)


def _batches(passages: Sequence[Passage]) -> Iterator[list[int]]:
    """Yield the places of passages of equal length, the longest first."""
    by_length: dict[int, list[int]] = {}
    for at, passage in enumerate(passages):
        by_length.setdefault(len(passage.ids), []).append(at)
    for _, places in sorted(by_length.items(), reverse=True):
        for first in range(0, len(places), MOST_ROWS):
            yield places[first : first + MOST_ROWS]


def summarize(answers: Answers) -> Summary:
    """Return accuracy and perplexity of at least two passages, with standard errors over passages."""
    count = len(answers.losses)
    perplexity = math.exp(answers.losses.mean())
    errors = [float(values.std(ddof=1)) / math.sqrt(count) for values in (answers.right, answers.losses)]
    return Summary(count, float(answers.right.mean()), errors[0], perplexity, perplexity * errors[1])


def compare(answers: Answers, other: Answers) -> Difference:
    """Compare two models passage by passage; intervals resample passages."""
    resamples = Bootstrap(range(len(answers.losses)))
    changed, accuracy = flips(other.right, answers.right), resamples.mean(answers.right - other.right)
    perplexity = resamples.mean(answers.losses - other.losses, after=np.exp)
    return Difference(accuracy, changed.gained, changed.lost, changed.p_value, perplexity)


def describe(words: LastWords) -> str:
    """Return what a model says of last words as two lines: figures with standard errors, differences with 95 % intervals."""
    found = words.summary
    differences = "; from the line before: ".join(map(_describe_difference, (words.from_first, words.from_previous)))
    return (
        f"  last words of {found.passages:,} passages: accuracy {found.accuracy:.1%} +- {found.accuracy_error:.1%}, "
        f"perplexity {found.perplexity:.2f} +- {found.perplexity_error:.2f}\n"
        f"    from exact: {differences}"
    )


def _describe_difference(difference: Difference) -> str:
    """Return a difference as text."""
    accuracy, perplexity = difference.accuracy, difference.perplexity
    (low, high), (least, most) = accuracy.interval or (0.0, 0.0), perplexity.interval or (1.0, 1.0)
    return (
        f"accuracy {accuracy.value:+.1%} ({low:+.1%} to {high:+.1%}; +{difference.gained} -{difference.lost}, "
        f"p {difference.p_value:.2g}), perplexity x {perplexity.value:.3f} ({least:.3f} to {most:.3f})"
    )

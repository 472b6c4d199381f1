"""What the library itself answers. A few models have several answers: from their cache, from a plain forward, by attention."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.reference import Greedy, Reference
from tests.survey.weights import FIRST_TOKEN, LAST_TOKEN

DISAGREEMENT = 1e-3
"""Largest difference, in nats, between two answers of the library that is called rounding."""
PROMPT_LENGTHS = (1, 5, 40)


@dataclass(frozen=True)
class Truth:
    """One way in which the library answers."""

    name: str
    reference: Reference
    remark: str = ""
    """How it differs from the first way."""


class ForwardReference(Reference):
    """The reference without ``generate``: each token comes from a plain forward of all tokens before it."""

    def __init__(self, reference: Reference) -> None:
        self.model = reference.model

    def greedy(self, ids: Sequence[int], max_new_tokens: int, *, eos: int | None = None) -> Greedy:
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        ends = self.end_tokens if eos is None else {eos}
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in ends):
            rows.append(self.log_probs([*ids, *tokens])[-1])
            tokens.append(int(rows[-1].argmax()))
        return Greedy(tokens, torch.stack(rows))


class DefaultReference(Reference):
    """The reference with the attention that the library chooses itself."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def library_truths(folder: Path) -> list[Truth]:
    """Returns the eager model's ``generate`` and each other way of the library that differs from it."""
    eager, default = Reference(folder), DefaultReference(folder)
    truths = [Truth("generate", eager)]
    cached = max(_difference(eager, eager, prompt) for prompt in _prompts())
    if cached > DISAGREEMENT:
        remark = f"generate and the plain forward of transformers differ by {cached:.1g}"
        truths.append(Truth("plain forward", ForwardReference(eager), remark))
    attention = max(_difference(default, eager, prompt) for prompt in _prompts())
    if attention > max(DISAGREEMENT, 2 * cached):
        remark = f"eager and default attention of transformers differ by {attention:.1g}"
        truths.append(Truth("default attention", default, remark))
    return truths


def _prompts() -> list[list[int]]:
    chance = random.Random(7)
    return [[chance.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)] for length in PROMPT_LENGTHS]


def _difference(cached: Reference, plain: Reference, prompt: list[int]) -> float:
    """Largest difference, in nats, between what one model generates and the other's forward of the same tokens."""
    greedy = cached.greedy(prompt, 6)
    expected = plain.log_probs([*prompt, *greedy.token_ids])[len(prompt) - 1 : -1]
    return float((expected - greedy.log_probs).abs().nan_to_num(math.inf).max())

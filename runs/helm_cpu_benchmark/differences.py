"""In what two answers differ, and why HELM's client does (its own source, ``helm/clients/huggingface_client.py``)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexgen_helm.runs.helm_cpu_benchmark.answers import Answer, Asked
from flexgen_helm.runs.helm_cpu_benchmark.judge import Judge, same_logprobs

NUM_EQUAL_JUDGED = 20
NUM_SHOWN = 3

REASONS = {
    "answer": (
        "HELM's client samples, at a temperature of 1e-7 where 0 is asked; makes a stop string's token the only end token; and "
        "lets the tokenizer add a second BOS. Judged by plain transformers."
    ),
    "log-probabilities": (
        "HELM's client takes those of generated tokens after it has divided by the temperature: at 1e-7 they are 0 for every "
        "token."
    ),
    "token texts": (
        "HELM's client decodes tokens one by one, which loses spaces and parts of characters, and keeps the end token."
    ),
    "finish reason": "HELM's client gives none.",
}


@dataclass
class Differences:
    """Of all answers of an entry."""

    counts: dict[str, int]
    """By kind, the keys of ``REASONS``; one request may differ in several."""
    verdicts: dict[str, int] = field(default_factory=dict)
    """Who is right about the answers that differ, by plain transformers."""
    equal_judged: int = 0
    equal_right: int = 0
    """Of these, equal answers that are the model's."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """A few of the answers that differ."""


def kinds(asked: Asked, theirs: Answer, ours: Answer) -> list[str]:
    """Name what differs: "answer" is the text, or the log-probabilities where the prompt is scored."""
    same_scores = same_logprobs(theirs.logprobs, ours.logprobs)
    differs = {
        "answer": not same_scores if asked.scores_prompt else theirs.text != ours.text,
        "log-probabilities": not asked.scores_prompt and not same_scores,
        "token texts": theirs.tokens != ours.tokens,
        "finish reason": theirs.finish_reason != ours.finish_reason,
    }
    return [kind for kind, found in differs.items() if found]


def compare(pairs: Sequence[tuple[Asked, Answer, Answer]], judge: Judge) -> Differences:
    """Count what differs and judge it.

    Args:
        pairs: Request, answer of HELM's client, answer of the engine.
        judge: Sees every answer that differs, and some that are equal.
    """
    found = [(pair, kinds(*pair)) for pair in pairs]
    result = Differences({kind: sum(kind in names for _, names in found) for kind in REASONS})
    different = [pair for pair, names in found if "answer" in names]
    equal = [pair for pair, names in found if "answer" not in names]
    result.verdicts = dict(Counter(judge.verdict(*pair) for pair in different))
    sample = random.Random(0).sample(equal, min(NUM_EQUAL_JUDGED, len(equal)))
    result.equal_judged = len(sample)
    result.equal_right = sum(judge.verdict(*pair) in ("both", "tie") for pair in sample)
    for asked, theirs, ours in different[:NUM_SHOWN]:
        texts = {"HELM's client": theirs.text, "engine": ours.text, "transformers": judge.truth(asked).text}
        result.examples.append({"prompt ends": asked.prompt[-60:], **texts})
    return result

"""In what two answers differ, and why HELM's client does (its own source, ``helm/clients/huggingface_client.py``)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_helm.runs.helm_cpu_benchmark.answers import Answer, Asked
from flexgen_helm.runs.helm_cpu_benchmark.judge import CLIENT, ENGINE, Judge, same_logprobs

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


@dataclass(frozen=True)
class Differences:
    """The differences between the two sides' answers to all requests of an entry."""

    counts: dict[str, int]
    """By kind, the keys of ``REASONS``; one request may differ in several."""
    verdicts: dict[str, int]
    """Who is right about the answers that differ, by plain transformers."""
    equal_judged: int
    equal_right: int
    """Number of the judged equal answers that are the model's."""
    scored_right: dict[str, int]
    """Number of judged requests that got the model's log-probabilities, by side."""
    examples: list[dict[str, str]]
    """A few of the answers that differ."""

    @property
    def judged(self) -> int:
        """Requests that plain transformers answered as well."""
        return self.equal_judged + sum(self.verdicts.values())


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
    different = [pair for pair, names in found if "answer" in names]
    equal = [pair for pair, names in found if "answer" not in names]
    sample = random.Random(0).sample(equal, min(NUM_EQUAL_JUDGED, len(equal)))
    judged = [(pair, judge.truth(pair[0])) for pair in [*different, *sample]]
    verdicts = [truth.verdict(*pair) for pair, truth in judged]
    return Differences(
        counts={kind: sum(kind in names for _, names in found) for kind in REASONS},
        verdicts=dict(Counter(verdicts[: len(different)])),
        equal_judged=len(sample),
        equal_right=sum(verdict in ("both", "tie") for verdict in verdicts[len(different) :]),
        scored_right={
            CLIENT: sum(truth.scored(theirs) for (_, theirs, _), truth in judged),
            ENGINE: sum(truth.scored(ours) for (_, _, ours), truth in judged),
        },
        examples=[
            {"prompt ends": asked.prompt[-60:], CLIENT: theirs.text, ENGINE: ours.text, "transformers": truth.text}
            for (asked, theirs, ours), truth in judged[: min(NUM_SHOWN, len(different))]
        ],
    )

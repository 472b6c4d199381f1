"""What every column is asked: last words of LAMBADA behind other passages, and windows of a text.

A passage of LAMBADA has about 80 tokens, fewer than the 128 of a chunk, within which this project's schemes compress nothing.
So each question stands behind whole passages that come before it in the data: a prompt of several chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import FlexGenError
from flexgen_helm.types import Job

CONTEXT, ASKED = 5, 10
"""Of each group of passages in their order: the first ones are context, the others are asked behind it, one at a time."""
BETWEEN = "\n\n"
"""Between two passages; a passage has no line break."""
WINDOW = 2000
"""Predicted tokens of a window."""
ANSWER_TOKENS = 8
"""Room for the word and what shows that it ends, as in the scenario."""


@dataclass(frozen=True)
class Question:
    """A passage without its last word, behind others."""

    prompt: str
    word: str
    group: int
    """Number of the context; questions with equal ones depend on each other."""

    @property
    def job(self) -> Job:
        """What answers it, greedily."""
        return Job(prompt=self.prompt, max_new_tokens=ANSWER_TOKENS, stop=("\n",))


def most_questions(num_passages: int) -> int:
    """Return how many questions there are in so many passages."""
    whole, rest = divmod(num_passages, CONTEXT + ASKED)
    return whole * ASKED + max(0, rest - CONTEXT)


def make_questions(passages: Sequence[str], count: int) -> list[Question]:
    """Return the first questions.

    Args:
        passages: Of at least two words each, in any number.
        count: Of questions.

    Raises:
        FlexGenError: If there are not so many.
    """
    most = most_questions(len(passages))
    if not 1 <= count <= most:
        raise FlexGenError(f"{count} questions cannot be asked: {len(passages):,} passages give 1 to {most:,}.")
    questions = []
    for number in range(count):
        group, place = divmod(number, ASKED)
        first = group * (CONTEXT + ASKED)
        context = [text.strip() for text in passages[first : first + CONTEXT]]
        start, _, word = passages[first + CONTEXT + place].strip().rpartition(" ")
        questions.append(Question(BETWEEN.join([*context, start]), word, group))
    return questions


def make_windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, most: int) -> list[Job]:
    """Return jobs that score the beginning of a text, each behind the end token and without what is before it.

    Args:
        tokenizer: It has an end token.
        text: Any.
        count: Tokens to be predicted.
        most: Tokens of the model's context.

    Raises:
        FlexGenError: If the text has fewer tokens.
    """
    tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if not 1 <= count <= len(tokens):
        raise FlexGenError(f"{count:,} tokens cannot be predicted: the text has 1 to {len(tokens):,}.")
    size = min(WINDOW, most - 1)
    parts = (tokens[i : min(i + size, count)] for i in range(0, count, size))
    return [Job(token_ids=[tokenizer.eos_token_id, *part], score_prompt=True) for part in parts]

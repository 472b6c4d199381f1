"""Multiple-choice questions without sense, as many as wanted, in the files of HELM's ``custom_mcqa``."""

from __future__ import annotations

import json
import random
from pathlib import Path

NUM_CHOICES = 4
NUM_EXAMPLES = 5
SYLLABLES = ("an", "be", "co", "der", "ex", "for", "ion", "ly", "ment", "or", "pre", "re", "sta", "ter", "un", "ver")
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]


def write_questions(path: Path, count: int, seed: int) -> None:
    """Write examples and questions of 20 to 60 words with four choices of 2 to 8 words, as long as those of MMLU."""
    chance = random.Random(seed)
    splits = ["train"] * NUM_EXAMPLES + ["test"] * count
    path.write_text("\n".join(json.dumps(_question(chance, split)) for split in splits) + "\n", encoding="utf-8")


def _question(chance: random.Random, split: str) -> dict[str, object]:
    right = chance.randrange(NUM_CHOICES)
    references = [
        {"output": {"text": _text(chance, 2, 8)}, "tags": ["correct"] if number == right else []}
        for number in range(NUM_CHOICES)
    ]
    return {"input": {"text": _text(chance, 20, 60) + "?"}, "references": references, "split": split}


def _text(chance: random.Random, least: int, most: int) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(least, most))).capitalize()


LEAST_REQUESTS = 8 * NUM_CHOICES
"""With fewer the scored quarter would be empty."""


def suite_entries(folder: Path, num_requests: int) -> list[str]:
    """Write questions and return the run entries that ask them, without a model.

    Half of the requests are 5-shot questions answered with one token, a quarter scores each choice of a question alone, and a
    quarter generates 20 tokens; each kind comes from two files.

    Args:
        folder: Made for the files.
        num_requests: Number of requests of the whole suite, at least LEAST_REQUESTS.
    """
    folder.mkdir(parents=True)
    scored = num_requests // 4 // (2 * NUM_CHOICES) * 2
    generated = num_requests // 4
    kinds = {
        "method=multiple_choice_joint": num_requests - scored * NUM_CHOICES - generated,
        "method=multiple_choice_separate_original": scored,
        "method=multiple_choice_joint,num_output_tokens=20,stop=none": generated,
    }
    entries = []
    for number, (arguments, count) in enumerate(kinds.items()):
        for half, size in enumerate((count // 2, count - count // 2)):
            path = folder / f"{number}{half}.jsonl"
            write_questions(path, size, seed=2 * number + half)
            entries.append(f"custom_mcqa:path={path},num_train_instances={NUM_EXAMPLES},{arguments}")
    return entries

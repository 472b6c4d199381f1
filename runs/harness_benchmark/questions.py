"""MMLU questions of one subject as 5-shot prompts, in a file that every harness reads."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from flexgen_helm.assets.helm_data import helm_data_folders
from flexgen_helm.errors import FlexGenError

SHOTS = 5


def write_questions(file: Path, subject: str, count: int) -> int:
    """Write questions as lines of JSON with ``prompt`` (examples and question) and ``label`` (0 to 3); return their number.

    Args:
        file: The file.
        subject: Subject of MMLU, such as "anatomy".
        count: Most questions.

    Raises:
        FlexGenError: If there is no such subject, or the data cannot be fetched.
    """
    data = next((path for path in (folder / "mmlu" / "data" for folder in helm_data_folders()) if path.is_dir()), None)
    assert data is not None  # helm_data_folders fetches them
    if not (data / "test" / f"{subject}_test.csv").exists():
        names = sorted(path.stem.removesuffix("_test") for path in (data / "test").glob("*.csv"))
        raise FlexGenError(f"MMLU has no subject {subject!r}. Its subjects are {', '.join(names)}.")
    examples, questions = (_rows(data / split / f"{subject}_{split}.csv") for split in ("dev", "test"))
    title = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    shown = title + "".join(f"{_written(row)} {row[-1]}\n\n" for row in examples[:SHOTS])
    lines = [json.dumps({"prompt": shown + _written(row), "label": "ABCD".index(row[-1])}) for row in questions[:count]]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def _rows(file: Path) -> list[list[str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.reader(lines))


def _written(row: list[str]) -> str:
    """Return a question with its choices, ending with the word before the answer."""
    question, *choices = row[:-1]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    return f"{question}\n{listed}\nAnswer:"

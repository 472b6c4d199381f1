"""Questions like those of the benchmark of harnesses, so short that tiny models hold them."""

from __future__ import annotations

import json
from pathlib import Path


def made_questions(folder: Path) -> Path:
    """Writes six questions and returns the file."""
    words = ("dog", "fox", "owner", "lazy", "quick", "mind")
    rows = [{"prompt": f"The {word}?\nA. Paris\nB. Rome\nAnswer:", "label": i % 4} for i, word in enumerate(words)]
    file = folder / "made_questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

"""Accelerate's side, a process of its own: ``generate`` with a part of the model in memory and the rest on disk.

``python -m flexgen_helm.runs.larger_than_ram.accelerate_side task.json result.json``
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Task:
    """What to load and to answer."""

    folder: str
    dtype: str
    offload_folder: str
    memory_bytes: int
    """Accelerate's ``max_memory`` for weights that stay."""
    batch_sizes: list[int]
    """Tried in this order, each on as many prompts, until throughput falls."""
    prompts: list[list[int]]
    new_tokens: int
    threads: int


@dataclass
class Batch:
    """One call of ``generate``."""

    size: int
    seconds: float
    tokens: list[list[int]]
    """New tokens of each sequence."""

    @property
    def rate(self) -> float:
        """Sequences per second."""
        return self.size / self.seconds


@dataclass
class Answers:
    """What the process has done so far: it may be killed at any moment."""

    load_s: float = 0.0
    placed: dict[str, int] = field(default_factory=dict)
    """Modules by where Accelerate put them."""
    batches: list[Batch] = field(default_factory=list)
    trying: int | None = None
    """Batch size of the call that was begun last and has not ended."""

    @property
    def best(self) -> Batch | None:
        """The batch of the highest throughput."""
        return max(self.batches, key=lambda batch: batch.rate, default=None)


def read_answers(path: Path) -> Answers:
    """Read what a process left behind; nothing if it did not come so far."""
    if not path.exists():
        return Answers()
    found = json.loads(path.read_text(encoding="utf-8"))
    return Answers(**{**found, "batches": [Batch(**batch) for batch in found["batches"]]})


def answer(task: Task, result: Path) -> None:
    """Load the model and try batch sizes, writing down each step before and after it."""
    torch.set_num_threads(task.threads)
    answers = Answers()
    begun = time.perf_counter()
    model = load(task)
    answers.load_s = time.perf_counter() - begun
    places = [str(place) for place in getattr(model, "hf_device_map", {"": "cpu"}).values()]  # nothing where all of it fits
    answers.placed = {place: places.count(place) for place in sorted(set(places))}
    for size in task.batch_sizes:
        answers.trying = size
        _write(answers, result)
        begun = time.perf_counter()
        tokens = generate(model, task.prompts[:size], task.new_tokens)
        best = answers.best
        answers.batches.append(Batch(size, time.perf_counter() - begun, tokens))
        answers.trying = None
        _write(answers, result)
        if best is not None and answers.batches[-1].rate < best.rate:
            break


def load(task: Task) -> Any:
    """Load as Accelerate's documentation of big models says: what does not fit in ``max_memory`` goes to disk."""
    return AutoModelForCausalLM.from_pretrained(
        task.folder,
        dtype=getattr(torch, task.dtype),
        attn_implementation="sdpa",
        device_map="auto",
        max_memory={"cpu": task.memory_bytes},
        offload_folder=task.offload_folder,
    ).eval()


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Continue prompts greedily as one batch, padded on the left, with the model's own ``generate``."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    new: list[list[int]] = output[:, longest:].tolist()
    return new


def _write(answers: Answers, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(answers)), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    answer(Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), Path(sys.argv[2]))

"""Accelerate's side, a process of its own for each batch: ``generate`` with a part of the model in memory, the rest on disk.

``python accelerate_side.py task.json result.json``, by any interpreter that has torch, transformers and accelerate: nothing of
this package is imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Task:
    """A model to load and prompts to answer."""

    folder: str
    dtype: str
    offload_folder: str
    memory_bytes: int
    """Accelerate's ``max_memory`` for weights that stay."""
    prompts: list[list[int]]
    """One batch."""
    new_tokens: int
    threads: int
    device_bytes: int | None = None
    """``max_memory`` for weights on the first GPU, which then computes. None: the CPU does."""


@dataclass(frozen=True)
class Batch:
    """Times and tokens of one call of ``generate``."""

    load_s: float
    placed: dict[str, int]
    """Modules by where Accelerate put them."""
    seconds: float
    tokens: list[list[int]]
    """New tokens of each sequence."""
    processor_s: float = 0.0
    """Seconds of all cores together in ``generate``."""

    @property
    def size(self) -> int:
        """How many sequences."""
        return len(self.tokens)

    @property
    def rate(self) -> float:
        """Sequences per second."""
        return self.size / self.seconds


def answer(task: Task) -> Batch:
    """Load the model and answer the batch."""
    torch.set_num_threads(task.threads)
    begun = time.perf_counter()
    model = load(task)
    loaded, processor = time.perf_counter(), time.process_time()
    device = "cpu" if task.device_bytes is None else "cuda:0"
    tokens = generate(model, task.prompts, task.new_tokens, device)
    seconds, processor_s = time.perf_counter() - loaded, time.process_time() - processor
    places = [str(place) for place in getattr(model, "hf_device_map", {"": "cpu"}).values()]  # nothing where all of it fits
    placed = {place: places.count(place) for place in sorted(set(places))}
    return Batch(loaded - begun, placed, seconds, tokens, processor_s)


def load(task: Task) -> Any:
    """Load as Accelerate's documentation of big models says: what does not fit in ``max_memory`` goes to disk."""
    device = {} if task.device_bytes is None else {0: task.device_bytes}
    return AutoModelForCausalLM.from_pretrained(
        task.folder,
        dtype=getattr(torch, task.dtype),
        attn_implementation="sdpa",
        device_map="auto",
        max_memory={**device, "cpu": task.memory_bytes},
        offload_folder=task.offload_folder,
    ).eval()


@torch.inference_mode()
def generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, device: str = "cpu") -> list[list[int]]:
    """Continue prompts greedily as one batch, padded on the left, with the model's own ``generate``.

    Where weights are on disk, a model does not say itself which device computes.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    new: list[list[int]] = output[:, longest:].tolist()
    return new


if __name__ == "__main__":
    batch = answer(Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text(json.dumps(asdict(batch)), encoding="utf-8")

"""vLLM's side, run as a script by an interpreter that has vLLM: it imports nothing of this package.

Usage: ``python vllm_side.py TASK.json ANSWERS.json``. The task has the model folder, dtype, token ids of the prompts, new
tokens, log-probabilities wanted, and repetitions; see `contenders.Task`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import vllm  # type: ignore[import-not-found]

BLOCK_TOKENS = 32
"""Only whole blocks of a prefix are shared. vLLM's default on a CPU is 128, which takes up to twice the time here."""
WARM_UP = 2
"""Prompts that are answered before the measurement."""


def answer(model: vllm.LLM, prompts: list[list[int]], sampling: vllm.SamplingParams) -> tuple[list[list[int]], float, float]:
    """Return the new tokens of each prompt, and the wall and processor seconds that they took."""
    model.reset_prefix_cache()
    wall, processor = time.perf_counter(), time.process_time()
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - wall, time.process_time() - processor
    return [list(output.outputs[0].token_ids) for output in outputs], *seconds


def main(task_file: str, answers_file: str) -> None:
    """Answer the prompts of a task as often as it asks."""
    task: dict[str, Any] = json.loads(Path(task_file).read_text(encoding="utf-8"))
    begun = time.perf_counter()
    model = vllm.LLM(
        task["folder"],
        dtype=task["dtype"],
        max_model_len=task["max_length"],
        enable_prefix_caching=True,
        block_size=task.get("block", BLOCK_TOKENS),
    )
    loaded = time.perf_counter() - begun
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=task["new_tokens"], ignore_eos=True, logprobs=task["candidates"] or None, detokenize=False
    )
    answer(model, task["prompts"][:WARM_UP], sampling)
    runs = [answer(model, task["prompts"], sampling) for _ in range(task["repeats"])]
    found = {
        "tokens": runs[-1][0],
        "wall_s": [wall for _, wall, _ in runs],
        "processor_s": [processor for _, _, processor in runs],
        "load_s": loaded,
        "threads": torch.get_num_threads(),
        "note": f"vLLM {vllm.__version__}",
    }
    Path(answers_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

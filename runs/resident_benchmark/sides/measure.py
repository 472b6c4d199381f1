"""Lets one contender answer prompts and measures it, a process of its own.

It runs by its path, by any interpreter that has torch, so it and the sides import nothing of this package that they do not
measure: ``python measure.py SIDE TASK.json ANSWERS.json``. A side is a module beside this one with a function ``ways``,
which loads the model of a task and returns functions that answer prompts, by the setting that distinguishes them.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

Prompts = list[list[int]]
Answer = Callable[[Prompts], Prompts]
WARM_UP = 2
"""Prompts that are answered before anything is measured."""
SAMPLE = 16
"""Prompts with which the best of several settings is found."""


def timed(answer: Answer, prompts: Prompts) -> tuple[Prompts, float, float]:
    """Return the new tokens of each prompt, and the wall and processor seconds that they took."""
    wall, processor = time.perf_counter(), time.process_time()
    tokens = answer(prompts)
    return tokens, time.perf_counter() - wall, time.process_time() - processor


def measure(ways: dict[str, Answer], prompts: Prompts, repeats: int) -> dict[str, Any]:
    """Answer prompts several times in the way that takes the least processor time for the first of them.

    Args:
        ways: Functions that answer prompts, by setting.
        prompts: Token ids of each prompt.
        repeats: How often all prompts are answered.
    """
    tried = dict[str, float]()
    for setting, answer in ways.items():
        answer(prompts[:WARM_UP])
        if len(ways) > 1:
            tried[setting] = timed(answer, prompts[:SAMPLE])[2]
    best = min(ways, key=lambda setting: tried.get(setting, 0.0))
    runs = [timed(ways[best], prompts) for _ in range(repeats)]
    return {
        "tokens": runs[-1][0],
        "wall_s": [wall for _, wall, _ in runs],
        "processor_s": [processor for _, _, processor in runs],
        "setting": best,
        "tried_s": tried,
    }


def main(side: str, task_file: str, answers_file: str) -> None:
    """Load the model of a task, answer its prompts and write the answers down."""
    task: dict[str, Any] = json.loads(Path(task_file).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    begun = time.perf_counter()
    with ExitStack() as stack:
        ways = importlib.import_module(side).ways(task, stack)
        loaded = time.perf_counter() - begun
        found = {"load_s": loaded, **measure(ways, task["prompts"], task["repeats"])}
    Path(answers_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Lets one backend of a harness evaluate questions and measures it, a process of its own.

``python -m flexgen_helm.runs.harness_benchmark.sides.measure HARNESS BACKEND TASK.json RESULT.json``
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flexgen_helm.runs.harness_benchmark.sides.way import Outcome, Way

WARM_UP = 2
"""Questions that are evaluated before anything is measured."""


def timed(way: Way, count: int) -> tuple[Outcome, float, float]:
    """Return what an evaluation gave, and the wall and processor seconds that it took."""
    wall, processor = time.perf_counter(), time.process_time()
    outcome = way(count)
    return outcome, time.perf_counter() - wall, time.process_time() - processor


def measure(ways: dict[str, Way], *, count: int, sample: int, repeats: int) -> dict[str, Any]:
    """Evaluate questions several times in the way that takes the least processor time for the first of them.

    Args:
        ways: The ways, by their setting.
        count: Number of questions.
        sample: Questions with which the best of several ways is found.
        repeats: How often all questions are evaluated.
    """
    tried = dict[str, tuple[float, float]]()
    for setting, way in ways.items():
        way(WARM_UP)
        if len(ways) > 1:
            _, wall, processor = timed(way, sample)
            tried[setting] = (processor, wall)
    best = min(tried, key=tried.__getitem__) if tried else next(iter(ways))
    runs = [timed(ways[best], count) for _ in range(repeats)]
    return {
        "score": runs[-1][0].score,
        "answers": runs[-1][0].answers,
        "wall_s": [wall for _, wall, _ in runs],
        "processor_s": [processor for _, _, processor in runs],
        "setting": best,
        "tried_s": tried,
    }


def main(harness: str, backend: str, task_file: str, result_file: str) -> None:
    """Load a model, evaluate the questions of a task and write down what came out."""
    task: dict[str, Any] = json.loads(Path(task_file).read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    begun = time.perf_counter()
    ways = importlib.import_module(f"{__package__}.{harness}_side").ways(backend, task)
    loaded = time.perf_counter() - begun
    found = measure(ways, count=task["count"], sample=task["sample"], repeats=task["repeats"])
    Path(result_file).write_text(json.dumps({"load_s": loaded, **found}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

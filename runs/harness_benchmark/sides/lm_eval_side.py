"""lm-eval: the choices of each question are scored."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flexgen_helm.harnesses.lm_eval_model import FlexGenLM
from flexgen_helm.runs.harness_benchmark.sides.way import Outcome, Way

BATCH_SIZES = (1, 4, 8, 16, "auto")
MOST = 16
"""Largest batch that "auto" tries: its logits of a whole vocabulary take 2 GiB, and 64, the default, would take 9."""
NAME = "mmlu_of_files"


def ways(backend: str, task: dict[str, Any]) -> dict[str, Way]:
    """Load the model; return a way for each batch size."""
    scratch = Path(task["scratch"])
    (scratch / f"{NAME}.yaml").write_text(json.dumps(config(task["questions"])), encoding="utf-8")  # JSON is YAML
    manager = TaskManager(include_path=str(scratch), include_defaults=False)
    if backend == "flexgen":
        ours = FlexGenLM(task["folder"], dtype="float32", device="cpu")
        return {"one workload": partial(evaluate, ours, manager, None)}
    theirs = HFLM(pretrained=task["folder"], dtype="float32", device="cpu", batch_size=1, max_batch_size=MOST)
    return {f"batches of {size}": partial(evaluate, theirs, manager, size) for size in BATCH_SIZES}


def config(questions: str) -> dict[str, Any]:
    """Return a multiple-choice task of questions in a file; the examples are in the prompts."""
    return {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": questions}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }


def evaluate(model: Any, manager: TaskManager, batch_size: int | str | None, count: int) -> Outcome:
    """Evaluate the first questions."""
    if batch_size is not None:
        model.batch_size_per_gpu = batch_size
    found = simple_evaluate(model, tasks=[NAME], task_manager=manager, limit=count, bootstrap_iters=0)
    samples = sorted(found["samples"][NAME], key=lambda sample: int(sample["doc_id"]))
    answers = [[float(logprob) for logprob, _ in sample["filtered_resps"]] for sample in samples]
    return Outcome(float(found["results"][NAME]["acc,none"]), answers)

"""Inspect: each question is answered with the most likely token, the question alone being the prompt."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, Model, get_model
from inspect_ai.scorer import accuracy, match

from flexgen_helm.runs.harness_benchmark.sides.way import Outcome, Way

CONNECTIONS = (1, 4, 8, 16, 32)
"""Requests in flight, which is the batch size of Inspect's Hugging Face provider; 32 is its default."""
OURS = 512
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that writes texts alone. Without a template, the Hugging Face provider would write the role before a text."""


def ways(backend: str, task: dict[str, Any]) -> dict[str, Way]:
    """Load the model; return a way for each number of requests in flight."""
    lines = Path(task["questions"]).read_text(encoding="utf-8").splitlines()
    samples = [
        Sample(id=i, input=row["prompt"], target="ABCD"[row["label"]]) for i, row in enumerate(map(json.loads, lines), 1)
    ]
    if backend == "flexgen":
        ours = get_model(f"flexgen/{task['folder']}", dtype="float32", device="cpu", use_chat_template=False)
        settings = GenerateConfig(max_tokens=1, temperature=0.0)
        return {f"{OURS} in flight": partial(evaluate, ours, settings, samples, task["scratch"], OURS)}
    options = {"model_path": task["folder"], "device": "cpu", "do_sample": False, "dtype": "float32", "chat_template": PLAIN}
    theirs = get_model("hf/local", **options)
    settings = GenerateConfig(max_tokens=1)
    return {f"batches of {size}": partial(evaluate, theirs, settings, samples, task["scratch"], size) for size in CONNECTIONS}


def evaluate(model: Model, settings: GenerateConfig, samples: list[Sample], folder: str, size: int, count: int) -> Outcome:
    """Evaluate the first questions.

    Args:
        model: The model.
        settings: Settings of generation.
        samples: All questions.
        folder: Folder for Inspect's log.
        size: Requests in flight.
        count: Number of questions.

    Raises:
        RuntimeError: If the evaluation fails.
    """
    task = Task(dataset=samples[:count], scorer=match(location="begin"), metrics=[accuracy()], config=settings)
    (log,) = eval(task, model=model, max_connections=size, log_dir=folder, display="none", log_level="error")
    if log.status != "success" or log.results is None or log.samples is None:
        raise RuntimeError(f"the evaluation ended with {log.status}: {log.error}")
    answers = {int(sample.id): sample.output.completion for sample in log.samples}
    return Outcome(log.results.scores[0].metrics["accuracy"].value, [answers[i] for i in sorted(answers)])

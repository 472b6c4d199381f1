"""The engine: all prompts as one workload."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from flexgen_helm import Engine, Job


def ways(
    task: dict[str, Any], stack: ExitStack, *, compile_layers: bool = False
) -> dict[str, Callable[[list[list[int]]], list[list[int]]]]:
    """Load the model; there is one way."""
    options = {"dtype": task["dtype"], "device": "cpu", "compile_layers": compile_layers}
    engine = stack.enter_context(Engine.from_pretrained(task["folder"], **options))

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        asked = {"max_new_tokens": task["new_tokens"], "top_logprobs": task["candidates"]}
        results = engine.run([Job(token_ids=ids, **asked) for ids in prompts], progress=False)
        return [result.completions[0].token_ids for result in results]

    policy = engine.policy
    return {f"rows of {policy.gpu_batch_size} and {policy.gpu_batch_tokens}": answer}

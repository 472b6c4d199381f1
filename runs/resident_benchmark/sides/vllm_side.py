"""vLLM on the CPU, with prefix caching; its cache is emptied before each repetition."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import vllm  # type: ignore[import-not-found]

BLOCK_TOKENS = 32
"""Only whole blocks of a prefix are shared. The default on a CPU is 128, which takes up to twice the time; 16 is refused."""


def ways(task: dict[str, Any], stack: ExitStack) -> dict[str, Callable[[list[list[int]]], list[list[int]]]]:
    """Load the model; there is one way."""
    model = vllm.LLM(
        task["folder"],
        dtype=task["dtype"],
        max_model_len=task["max_length"],
        enable_prefix_caching=True,
        block_size=BLOCK_TOKENS,
    )
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=task["new_tokens"], ignore_eos=True, logprobs=task["candidates"] or None, detokenize=False
    )

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        model.reset_prefix_cache()
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return {f"blocks of {BLOCK_TOKENS}, vLLM {vllm.__version__}": answer}

"""transformers' continuous batching, ``generate_batch``, which shares pages of a prefix and packs prompts of any length."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

PAGE_TOKENS = (32, 256)
"""256 is the default. Only whole pages are shared."""
BATCH_TOKENS = (128, 512)
"""Tokens of a forward. By default it takes as many as memory allows, and computes the padding: three times slower."""
CACHE_TOKENS = 16384
"""Tokens whose K and V are kept."""


def ways(task: dict[str, Any], stack: ExitStack) -> dict[str, Callable[[list[list[int]]], list[list[int]]]]:
    """Load the model; return a way for each size of pages and of forwards."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        task["folder"], dtype=getattr(torch, task["dtype"]), attn_implementation="sdpa"
    ).eval()
    greedy = GenerationConfig(max_new_tokens=task["new_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0)

    def way(page: int, size: int) -> Callable[[list[list[int]]], list[list[int]]]:
        settings = ContinuousBatchingConfig(page_size=page, num_blocks=CACHE_TOKENS // page, max_batch_tokens=size)

        def answer(prompts: list[list[int]]) -> list[list[int]]:
            found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=settings)
            return [output.generated_tokens for output in in_order(found)]

        return answer

    return {f"pages of {page}, forwards of {size} tokens": way(page, size) for page in PAGE_TOKENS for size in BATCH_TOKENS}


def in_order(found: dict[str, Any]) -> list[Any]:
    """Return outputs in the order of their requests, whose ids end with a number."""
    return [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]

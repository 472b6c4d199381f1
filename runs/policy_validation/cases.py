"""Policies that are run, and the jobs of each: every kind of placement, form of weights, block size and work."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import LlamaConfig

from flexgen_helm.types import ON_DEVICE, Job, Policy, Shares

ON_DISK: Shares = (0.0, 0.0, 1.0)
HALF: Shares = (0.5, 0.0, 0.5)
SMALL, LARGE = (4, 32), (32, 256)
"""Sequences of a decode row and tokens of a prefill row."""


@dataclass(frozen=True)
class Sizes:
    """How much work there is.

    Attributes:
        num_prompts: Prompts of a case that scores or generates.
        prompt_len: Tokens of each.
        new_tokens: New tokens of each that generates.
        long_prompt_len: Tokens of a long prompt, of which there are a quarter as many.
    """

    num_prompts: int = 32
    prompt_len: int = 96
    new_tokens: int = 16
    long_prompt_len: int = 640


@dataclass(frozen=True)
class Case:
    """A policy and what it is given.

    Attributes:
        name: Names it in the table.
        policy: The policy.
        work: Kind of jobs.
        compression: Variant of the model; None: 16 bits.
    """

    name: str
    policy: Policy
    work: Literal["score", "generate", "long"] = "generate"
    compression: str | None = None

    def jobs(self, sizes: Sizes, vocab_size: int) -> list[Job]:
        """Return its jobs, of random tokens."""
        count, length = sizes.num_prompts, sizes.prompt_len
        if self.work == "long":
            count, length = max(1, count // 4), sizes.long_prompt_len
        chance = random.Random(0)
        prompts = [[chance.randrange(1, vocab_size) for _ in range(length)] for _ in range(count)]
        if self.work == "score":
            return [Job(token_ids=prompt, score_prompt=True, max_new_tokens=0) for prompt in prompts]
        return [Job(token_ids=prompt, max_new_tokens=sizes.new_tokens) for prompt in prompts]


def _policy(
    rows: tuple[int, int], blocks: int, block_tokens: int, weights: Shares = ON_DEVICE, coding: str = "plain"
) -> Policy:
    return Policy(
        gpu_batch_size=rows[0],
        gpu_batch_tokens=rows[1],
        num_gpu_batches=blocks,
        block_tokens=block_tokens,
        weights=weights,
        slab_coding="lossless" if coding == "lossless" else "plain",
        keep_packed=coding == "w4",
    )


CASES: Sequence[Case] = (
    Case("RAM, large blocks", _policy(LARGE, 1, 512)),
    Case("RAM, small blocks", _policy(SMALL, 1, 32)),
    Case("RAM, scoring", _policy(LARGE, 1, 1024), "score"),
    Case("RAM, long prompts", _policy(SMALL, 1, 256), "long"),
    Case("disk, large blocks", _policy(LARGE, 1, 512, ON_DISK)),
    Case("disk, small blocks", _policy(SMALL, 2, 64, ON_DISK)),
    Case("disk, scoring", _policy(LARGE, 1, 512, ON_DISK), "score"),
    Case("half on disk", _policy(SMALL, 2, 512, HALF)),
    Case("disk, lossless", _policy(LARGE, 1, 512, ON_DISK, "lossless")),
    Case("disk, lossless, scoring", _policy(SMALL, 1, 256, ON_DISK, "lossless"), "score"),
    Case("RAM, w4", _policy(LARGE, 1, 512, coding="w4"), "generate", "w4"),
    Case("disk, w4, scoring", _policy(LARGE, 1, 512, ON_DISK, "w4"), "score", "w4"),
)


def write_config(folder: Path) -> Path:
    """Write the config of a small Llama, whose weights are made up, into a new folder; returns the folder."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return folder

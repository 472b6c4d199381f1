"""The two sides of the comparison, over the same weights: the engine, and plain transformers one request at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Job

NUM_CANDIDATES = 5
"""Candidates with log-probabilities that HELM asks for in multiple choice."""


def copy_without_end_tokens(model_folder: Path, target: Path) -> Path:
    """Makes a model folder with linked weights and no end token, so that everyone generates as many tokens as asked."""
    target.mkdir()
    for weights in model_folder.glob("*.safetensors*"):
        (target / weights.name).symlink_to(weights)
    config = json.loads((model_folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    (target / "generation_config.json").write_text("{}")
    for tokenizer_file in model_folder.glob("tokenizer*"):
        shutil.copy(tokenizer_file, target)
    return target


@dataclass
class Peer:
    """Plain transformers: PyTorch's attention, no gradients, logits of the last token only."""

    model: Any

    @classmethod
    def load(cls, model_folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Peer:
        """Loads the model on the CPU."""
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, attn_implementation="sdpa").eval()
        return cls(model)

    @torch.inference_mode()
    def next_tokens(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Answers each prompt with one token, by one forward each."""
        answers = []
        for ids in prompts:
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
            candidates = torch.log_softmax(logits, dim=-1).topk(NUM_CANDIDATES)
            answers.append([int(candidates.indices[0])])
        return answers

    @torch.inference_mode()
    def continuations(self, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]:
        """Continues each prompt greedily with its own ``generate``."""
        answers = []
        for ids in prompts:
            output = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=num_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            answers.append(output[0, len(ids) :].tolist())
        return answers


def engine_next_tokens(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Answers each prompt with one token, all prompts as one workload."""
    jobs = [Job(token_ids=ids, max_new_tokens=1, top_logprobs=NUM_CANDIDATES) for ids in prompts]
    return [result.completions[0].token_ids for result in engine.run(jobs, progress=False)]


def engine_continuations(engine: Engine, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[list[int]]:
    """Continues all prompts greedily as one workload."""
    jobs = [Job(token_ids=ids, max_new_tokens=num_new_tokens) for ids in prompts]
    return [result.completions[0].token_ids for result in engine.run(jobs, progress=False)]

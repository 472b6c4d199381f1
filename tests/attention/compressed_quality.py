"""What compressed K/V and sparse attention lose by their definition, on real weights: the reference against the exact model.

SmolLM2-135M in float32 reads the end token and the beginning of the addresses of 2024 and 2026 at once. KL is the mean
Kullback-Leibler divergence from the exact model in nats a token, top-1 the share of tokens with its first choice.
Cost on one core of a server CPU: about a minute a variant, 4 GiB of memory, and a download of 100 MB at the first time.

Command: ``python -m tests.attention.compressed_quality --tokens 2000 --variants kv4 s10``
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flexgen_helm.assets.smollm2 import smollm2_folder
from flexgen_helm.assets.sotu import recent_addresses
from flexgen_helm.compression.config import parse
from tests.attention.compressed_reference import reference_attention

VARIANTS = ["kv8", "kv4", "k4v2", "kv2", "s10", "s5", "kv4s10", "kv4-flexgen", "kv2-flexgen", "s10-flexgen"]
TOGETHER = 250
"""Tokens whose logits exist at once."""


def log_probs(model: PreTrainedModel, ids: Tensor, variant: str | None) -> Tensor:
    """Log-probabilities ``[T, vocabulary]`` behind each token."""
    with nullcontext() if variant is None else reference_attention(model, parse(variant)):
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
    return torch.cat([model.lm_head(part).log_softmax(-1) for part in hidden.split(TOGETHER)])


def main() -> None:
    """Measure variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    text = tokenizer(recent_addresses(), add_special_tokens=False)["input_ids"][: arguments.tokens - 1]
    ids = torch.tensor([[tokenizer.eos_token_id, *text]])
    print("variant        KL mean  KL median     top-1")
    with torch.inference_mode():
        exact = log_probs(model, ids, None)
        for variant in arguments.variants:
            found = log_probs(model, ids, variant)
            divergence = torch.stack([(p.exp() * (p - other)).sum() for p, other in zip(exact, found, strict=True)])
            agreement = (exact.argmax(-1) == found.argmax(-1)).float().mean()
            print(f"{variant:12}  {divergence.mean():8.5f}   {divergence.median():8.5f}  {agreement:7.1%}", flush=True)


if __name__ == "__main__":
    main()

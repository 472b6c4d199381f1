"""What compressed K/V and sparse attention lose by their definition, on real weights: the reference against the exact model.

SmolLM2-135M in float32 reads the end token and the beginning of the addresses of 2024 and 2026 at once. KL is the mean
Kullback-Leibler divergence from the exact model in nats a token, with a 95 % interval over blocks of consecutive tokens; top-1
is the share of tokens with its first choice. With ``--engine`` the engine's mean KL over the same tokens stands beside it.
Cost on one core of a server CPU: about a minute a variant, 4 GiB of memory, and a download of 100 MB at the first time.

Command: ``python -m tests.attention.compressed_quality --tokens 2000 --variants kv4 s10 --engine``
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Policy
from flexgen_helm.assets.smollm2 import smollm2_folder
from flexgen_helm.compression.config import parse
from flexgen_helm.fidelity.compare import final_states
from flexgen_helm.runs.cache_quality.__main__ import Loss, mean_of_tokens, measured, window_of
from tests.attention.compressed_reference import reference_attention

VARIANTS = ["kv8", "kv4", "k4v2", "kv2", "s10", "s5", "kv4s10", "kv4-flexgen", "kv2-flexgen", "s10-flexgen"]
TOGETHER = 250
"""Tokens whose logits exist at once."""


class EngineSide:
    """The engine on a text."""

    def __init__(self, exact: Engine, folder: Path, tokens: int) -> None:
        self._exact, self._folder = exact, folder
        self.window = window_of(exact, tokens)
        self._expected = final_states(exact, [self.window])

    def loss(self, variant: str) -> Loss:
        """What a variant loses against the engine as it is."""
        (loss,) = measured(self._exact, self._folder, variant, [(self.window, self._expected)])
        return loss


class Judge:
    """The reference on the same text."""

    @torch.inference_mode()
    def __init__(self, folder: Path, side: EngineSide) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._ids = torch.tensor([side.window.tokens])
        self._exact = self._log_probs(None)

    @torch.inference_mode()
    def loss(self, variant: str) -> Loss:
        """What a variant loses by its definition; bits are not counted."""
        found = self._log_probs(variant)
        divergence = torch.stack([(p.exp() * (p - other)).sum() for p, other in zip(self._exact, found, strict=True)])
        kl = mean_of_tokens(divergence.numpy().astype(np.float64))
        agreement = (self._exact.argmax(-1) == found.argmax(-1)).double().mean()
        return Loss(variant, self._ids.numel(), float("nan"), kl.value, kl.interval, float(agreement))

    def _log_probs(self, variant: str | None) -> Tensor:
        """Log-probabilities ``[T - 1, vocabulary]`` behind each token but the last."""
        with nullcontext() if variant is None else reference_attention(self._model, parse(variant)):
            hidden = self._model.base_model(self._ids, use_cache=False).last_hidden_state[0, :-1]
        return torch.cat([self._model.lm_head(part).log_softmax(-1) for part in hidden.split(TOGETHER)])


@contextmanager
def sides(folder: Path, tokens: int) -> Iterator[tuple[Judge, EngineSide]]:
    """Load both, for so many tokens of the text."""
    with Engine.from_pretrained(str(folder), dtype="float32", policy=Policy()) as exact:
        side = EngineSide(exact, folder, tokens)
        yield Judge(folder, side), side


def main() -> None:
    """Measure variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--engine", action="store_true", help="also measure the engine on the same tokens")
    arguments = parser.parse_args()
    print("variant        KL mean     95 % interval    top-1" + "   engine: KL  top-1" * arguments.engine)
    with sides(smollm2_folder(), arguments.tokens) as (judge, side):
        for variant in arguments.variants:
            wanted = judge.loss(variant)
            low, high = wanted.kl_interval or (0.0, float("inf"))
            line = f"{variant:12}  {wanted.kl:8.5f}  {low:.5f} to {high:.5f}  {wanted.top1:7.1%}"
            if arguments.engine:
                found = side.loss(variant)
                line += f"     {found.kl:8.5f}{found.top1:7.1%}" + "  outside of the interval" * (not low <= found.kl <= high)
            print(line, flush=True)


if __name__ == "__main__":
    main()

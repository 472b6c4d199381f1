"""Random weights under which a mistake shows: what a model predicts depends on tokens far back, and not on rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from tests.dimensions import VOCAB_SIZE
from tests.models import scale_weights
from tests.reference import TOKEN_TOLERANCE

FACTORS = (6.0, 9.0, 12.0, 4.0, 3.0, 2.0, 1.5, 1.0)
"""Factors of the matrices, in the order in which they are tried."""
VISIBLE = 100 * TOKEN_TOLERANCE
"""Smallest change of a log-probability, in nats, when two tokens 20 back change places."""
NOISE = TOKEN_TOLERANCE / 5
"""Largest change of a log-probability, in nats, when every weight moves by one rounding step of float32."""
SURE = 0.99
"""Largest mean probability of the most likely token; above, nothing else can be told apart."""
FIRST_TOKEN, LAST_TOKEN = 20, 310
"""Range of the tokens of prompts: no type has a special token there."""


@dataclass(frozen=True)
class Probe:
    """How the last position's log-probabilities react."""

    dependence: float
    """Largest change, in nats, when two tokens 20 back change places."""
    noise: float
    """Largest change, in nats, when every weight moves by one rounding step."""
    sureness: float
    """Mean probability of the most likely token."""

    @property
    def is_good(self) -> bool:
        """Whether a mistake would show and rounding would not."""
        return self.dependence > VISIBLE and self.noise < NOISE and self.sureness < SURE


def build_model(config: PreTrainedConfig) -> tuple[Any, float, Probe]:
    """Builds a model with random weights, scaled by the largest factor under which a mistake would show.

    Returns:
        The model, the factor, and how it reacts. If no factor is good, the one with the largest dependence on far tokens
        among those that rounding does not disturb.
    """
    found: dict[float, Probe] = {}
    for factor in FACTORS:
        model = _scaled(config, factor)
        found[factor] = probe(model)
        if found[factor].is_good:
            return model, factor, found[factor]
    best = max(found, key=lambda factor: (found[factor].noise < NOISE, found[factor].dependence))
    return _scaled(config, best), best, found[best]


def _scaled(config: PreTrainedConfig, factor: float) -> Any:
    torch.manual_seed(17)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    scale_weights(model, factor)
    end = VOCAB_SIZE - 1
    model.config.get_text_config(decoder=True).eos_token_id = model.config.eos_token_id = end
    model.generation_config = GenerationConfig(eos_token_id=end, bos_token_id=1, pad_token_id=0)
    return model


@torch.no_grad()
def probe(model: Any) -> Probe:
    """Measures how a model reacts; its weights are the same afterwards."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(FIRST_TOKEN, LAST_TOKEN, (1, 40), generator=generator)
    swapped = prompt.clone()
    swapped[0, 19], swapped[0, 20] = prompt[0, 20], prompt[0, 19]
    expected = _log_probs(model, prompt)
    dependence = _largest(_log_probs(model, swapped)[-1] - expected[-1])
    saved = [parameter.clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.mul_(1 + sign * torch.finfo(torch.float32).eps)
    noise = _largest(_log_probs(model, prompt) - expected)
    for parameter, value in zip(model.parameters(), saved, strict=True):
        parameter.copy_(value)
    return Probe(dependence, noise, float(expected.exp().amax(-1).mean()))


def _log_probs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)


def _largest(change: torch.Tensor) -> float:
    return float(change.abs().nan_to_num(math.inf).max())

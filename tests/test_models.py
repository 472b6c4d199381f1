"""The tiny models must be able to show a mistake: they depend on everything that the engine has to get right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dimensions import VOCAB_SIZE
from tests.models import FAMILIES, SINGLE, save_tiny
from tests.reference import TOKEN_TOLERANCE, Reference

VISIBLE = 100 * TOKEN_TOLERANCE
MECHANISMS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 512},
    "mixtral": {"sliding_window": 512},
    "starcoder2": {"sliding_window": 512},
    "phi3": {"sliding_window": 512},
    "gpt_oss": {"sliding_window": 512},
    "gemma3_text": {"sliding_window": 512},
    "gemma2": {"attn_logit_softcapping": 1000.0},
    "llama4_text": {"attention_chunk_size": 512},
}
"""A field for each mechanism, with a value that switches it off."""


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("family", [*FAMILIES, *SINGLE])
def test_predictions_depend_on_order_and_stay_moderate(family: str, prompt: list[int], tmp_path: Path) -> None:
    reference = Reference(save_tiny(family, tmp_path))
    swapped = [*prompt[:-4], prompt[-3], prompt[-4], *prompt[-2:]]
    change = (reference.log_probs(prompt)[-1] - reference.log_probs(swapped)[-1]).abs().max()
    states = reference.model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states
    assert change > VISIBLE
    assert max(float(state.detach().abs().max()) for state in states) < 1e2


@pytest.mark.parametrize("family", MECHANISMS)
def test_mechanism_is_visible(family: str, prompt: list[int], tmp_path: Path) -> None:
    reference = Reference(save_tiny(family, tmp_path))
    expected = reference.log_probs(prompt)[-1]
    reference.model.config.update(MECHANISMS[family])
    reference.model.save_pretrained(tmp_path / "without")
    assert (expected - Reference(tmp_path / "without").log_probs(prompt)[-1]).abs().max() > VISIBLE


def test_sinks_are_visible(prompt: list[int], tmp_path: Path) -> None:
    reference = Reference(save_tiny("gpt_oss", tmp_path))
    expected = reference.log_probs(prompt)[-1]
    with torch.no_grad():
        for name, parameter in reference.model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-1e4)
    assert (expected - reference.log_probs(prompt)[-1]).abs().max() > VISIBLE


def test_temperature_by_position_is_visible(prompt: list[int], tmp_path: Path) -> None:
    """Llama 4 scales queries by their position; cached and whole forwards of the reference agree about it."""
    reference = Reference(save_tiny("llama4_text", tmp_path))
    cached = reference.greedy(prompt, 4)
    assert torch.allclose(
        reference.log_probs(prompt + cached.token_ids)[-5:-1], cached.log_probs, atol=TOKEN_TOLERANCE, rtol=0.0
    )
    reference.model.config.update({"attn_temperature_tuning": False})
    reference.model.save_pretrained(tmp_path / "without")
    assert (cached.log_probs[0] - Reference(tmp_path / "without").log_probs(prompt)[-1]).abs().max() > VISIBLE

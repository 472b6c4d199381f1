"""Find the longest sequence that a model can compute: its context window, or less where its position encoding would change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
)
"""Config fields that give the context length in tokens, in the order of preference. The last is used by Whisper's decoder."""
DEFAULT_CONTEXT = 2048
"""Context length in tokens for configs that name none, such as those of models without positions."""


def context_of(model: nn.Module, config: PreTrainedConfig) -> tuple[int, str]:
    """Return the largest number of tokens of a job (input and new tokens together), and the reason for this limit.

    Args:
        model: The transformers model of ``config``, on any device.
        config: Config of the whole model; only its text part is read.
    """
    text = config.get_text_config(decoder=True)
    limit, reason = _named(text)
    padding = _padding_positions(model, limit)
    if padding:
        limit, reason = limit - padding, f"{reason} less the {padding} positions that its padding token takes"
    growing = min(_growing_ropes(model, limit), default=None)
    if growing is not None and growing[0] <= limit:
        limit, kind = growing
        reason = f"its original length, beyond which '{kind}' rotary embeddings change with the longest sequence"
    return limit, reason


def _named(text: PreTrainedConfig) -> tuple[int, str]:
    for name in CONTEXT_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value, f"its config's {name}"
    return DEFAULT_CONTEXT, "the default, since its config names no context length"


def _padding_positions(model: nn.Module, limit: int) -> int:
    """Return how many positions of a learned table are never used. RoBERTa counts positions from the padding id plus 1."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.num_embeddings == limit:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _growing_ropes(model: nn.Module, default: int) -> Iterator[tuple[int, str]]:
    """Yield the length up to which frequencies are constant, and the kind, of each rotary embedding that grows with length."""
    for module in model.modules():
        found = getattr(module, "rope_type", None)
        for layer_type, kind in found.items() if isinstance(found, dict) else [(None, found)]:
            if kind == "longrope":
                yield _original_length(module, layer_type, default), kind
            elif isinstance(kind, str) and "dynamic" in kind:
                # transformers compares with the model's own context, whatever original length the parameters name.
                yield int(getattr(module, "original_max_seq_len", default)), kind


def _original_length(module: Any, layer_type: str | None, default: int) -> int:
    parameters = module.config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    return int(parameters.get("original_max_position_embeddings") or default)

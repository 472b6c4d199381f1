"""What loading, checking and computing take beside what is kept, from a model's shapes, before anything is allocated."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexgen_helm.attention.visits import WINDOW_CHUNKS
from flexgen_helm.loading.assembly import FEW_TOKENS
from flexgen_helm.model.layers import layers_of, num_layers_of_every_kind
from flexgen_helm.types import ResolvedPolicy

HIDDEN_COPIES = 4
"""A token's hidden state, its rotary table and its K and V in one layer, in units of the hidden state."""
LOGITS_COPIES = 3
"""Logits in fp32, their log-probabilities, and what is sorted or summed of them."""
FP32 = torch.float32.itemsize


def working_bytes(model: PreTrainedModel, policy: ResolvedPolicy) -> int:
    """Most bytes that computing takes beside weights and cache: activations of a row, the smallest block, a slice of the head.

    An estimate: as if the outputs of all matrices of a layer were there at once.

    Args:
        model: On any device, such as meta.
        policy: Its sizes of rows.
    """
    vocab, hidden = _vocab_and_hidden(model)
    width = max(_outputs(layer, setting(model, "num_experts_per_tok")) for layer in layers_of(model))
    heads, head_dim = _heads(model)
    row = width + 2 * hidden + (WINDOW_CHUNKS + 1) * heads * head_dim
    head = policy.gpu_batch_size * vocab * LOGITS_COPIES
    return (policy.gpu_batch_tokens * row + head) * FP32 + block_bytes(model, least_block_tokens(policy))


def least_block_tokens(policy: ResolvedPolicy) -> int:
    """Prompt tokens of the smallest block that is planned."""
    return policy.block_tokens or policy.num_gpu_batches * policy.gpu_batch_tokens


def block_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """What so many prompt tokens keep between two layers."""
    return num_tokens * _vocab_and_hidden(model)[1] * model.dtype.itemsize * HIDDEN_COPIES


def first_layers_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model of as many of the first layers as hold one of every kind."""
    layers = layers_of(model)
    vocab, hidden = _vocab_and_hidden(model)
    weights = sum(p.nbytes for layer in layers[: num_layers_of_every_kind(model, layers)] for p in layer.parameters())
    return weights + 2 * min(FEW_TOKENS, vocab) * hidden * model.dtype.itemsize


def checking_bytes(model: PreTrainedModel, policy: ResolvedPolicy) -> int:
    """Most bytes that the self-check takes beside the model; of one in 16 bits the first layers are copied in fp32."""
    copies = 0 if model.dtype == torch.float32 else FP32 // model.dtype.itemsize
    return copies * first_layers_bytes(model) + working_bytes(model, policy)


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """About what K and V of a token take in all layers."""
    heads, head_dim = _heads(model)
    return 2 * len(layers_of(model)) * (setting(model, "num_key_value_heads") or heads) * head_dim * model.dtype.itemsize


def _outputs(layer: nn.Module, num_experts: int | None) -> int:
    """Numbers that the matrices of a layer put out for a token; of experts, which are stacked, those that it meets."""
    shapes = [p.shape for p in layer.parameters() if p.dim() > 1]
    return sum(shape[0] if len(shape) == 2 else shape[1] * min(shape[0], num_experts or shape[0]) for shape in shapes)


def _vocab_and_hidden(model: PreTrainedModel) -> tuple[int, int]:
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table.shape[0], table.shape[1]


def _heads(model: PreTrainedModel) -> tuple[int, int]:
    """Number and size of the attention heads; without any, as if there were one."""
    heads = setting(model, "num_attention_heads") or 1
    return heads, setting(model, "head_dim") or _vocab_and_hidden(model)[1] // heads


def setting(model: PreTrainedModel, name: str) -> int | None:
    """A number that the config names, if it names one for all layers."""
    try:
        found = getattr(model.config.get_text_config(decoder=True), name, None)
    except RuntimeError:  # one for each layer
        return None
    return found if isinstance(found, int) else None

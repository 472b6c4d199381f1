"""The judge of compressed K/V and sparse attention: the whole rule over a whole sequence in plain torch, without any page.

It shares no code with the engine: a model of transformers in float32, one sequence of which nothing is padded, runs with
`reference_attention` in place of its own attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from flexgen_helm.compression.config import CompressionConfig

CHUNK, PAGE, GROUP = 128, 32, 64
CUT = 0.05
"""Share of a range at each end that codes of 2 bits leave out."""
_names = itertools.count()


@dataclass(frozen=True)
class Call:
    """What a model's family decides in a call of attention, and its mask."""

    seen: Tensor
    """bool ``[T, T]``: which keys (columns) the mask shows to each query."""
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    """Logits ``[H]``; None: there are none."""


def attend(config: CompressionConfig, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """Attend with all queries of a sequence.

    Args:
        config: Bits of K and V, sparsity, and whose rule.
        q: ``[H, T, D]`` in float32.
        k: ``[H_kv, T, D]``.
        v: ``[H_kv, T, Dv]``.
        call: The rest.

    Returns:
        ``[H, T, Dv]``.
    """
    at = torch.arange(q.shape[1])
    # A query reads its own chunk exactly, FlexGen's its own token.
    same = at[:, None] == at if config.flexgen else (at // CHUNK)[:, None] == at // CHUNK
    k_read, v_read = stored(config, k, v)
    outputs = []
    for h in range(len(q)):
        g = h * len(k) // len(q)
        weights = attention_weights(torch.where(same, q[h] @ k[g].T, q[h] @ k_read[g].T), h, call)
        near, far = weights.where(same, 0), weights.where(~same, 0)
        chosen = far
        if config.sparsity is not None:
            chosen = far.where(largest(far, call.seen & ~same, config.sparsity), 0)
        output = near @ v[g] + chosen @ v_read[g]
        if config.sparsity is not None and not config.flexgen:
            whole = len(at) // PAGE * PAGE
            unread = (far - chosen)[:, :whole].unflatten(1, (-1, PAGE)).sum(-1)
            output += unread @ v_read[g, :whole].unflatten(0, (-1, PAGE)).mean(1)
        outputs.append(output)
    return torch.stack(outputs)


def attention_weights(products: Tensor, h: int, call: Call) -> Tensor:
    """Weights ``[T, T]`` of all keys, from products with the queries of head h; 0 where the mask hides a key."""
    scores = products * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~call.seen, float("-inf"))
    if call.sinks is None:
        return scores.softmax(-1)
    return torch.cat([scores, call.sinks[h].expand(len(scores), 1)], -1).softmax(-1)[:, :-1]


def largest(weights: Tensor, candidates: Tensor, percent: int) -> Tensor:
    """Which keys a query reads: of its candidates ``percent`` in a hundred, rounded up; of equal ones the first."""
    count = -(-candidates.sum(-1, keepdim=True) * percent // 100)
    order = weights.masked_fill(~candidates, -1).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order))
    return ranks < count


def stored(config: CompressionConfig, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What is read of K and V ``[H_kv, T, D]`` in compressed form; tokens that no query reads so stay as they are."""
    if config.flexgen:
        return tuple(per_group(x, bits, flexgen) for x, bits in ((k, config.k_bits), (v, config.v_bits)))  # type: ignore[return-value]
    k, v = k.clone(), v.clone()
    whole = k.shape[1] // PAGE * PAGE
    if config.k_bits < 16:
        pages = k[:, :whole].unflatten(1, (-1, PAGE)).transpose(-1, -2)
        k[:, :whole] = sealed(pages, config.k_bits).transpose(-1, -2).flatten(1, 2)
    v[:, :whole] = per_group(v[:, :whole], config.v_bits, sealed)
    return k, v


def per_group(x: Tensor, bits: int, quantise: Any) -> Tensor:
    """Each group of at most 64 neighbouring numbers of a token, quantised and read again."""
    return x if bits == 16 else torch.cat([quantise(part, bits) for part in x.split(GROUP, -1)], -1)


def sealed(x: Tensor, bits: int) -> Tensor:
    """Numbers that share a scale along the last dimension: bfloat16 zero at or below the least, scale rounded up."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    if bits == 2:
        margin = (high - low) * CUT
        low, high = low + margin, high - margin
    zero = rounded(low, up=False)
    scale = rounded((high - zero) / (2**bits - 1), up=True)
    codes = torch.where(scale > 0, (x - zero) / scale, 0.0).round().clamp(0, 2**bits - 1)
    return codes * scale + zero


def rounded(x: Tensor, *, up: bool) -> Tensor:
    """The next bfloat16 in a direction, as float32."""
    near = x.bfloat16()
    limit = torch.full_like(near, float("inf") if up else float("-inf"))
    wrong = near.float() < x if up else near.float() > x
    return torch.where(wrong, torch.nextafter(near, limit), near).float()


def flexgen(x: Tensor, bits: int) -> Tensor:
    """FlexGen's rounding (FlexLLMGen, ``compression.py``): float16 scale and minimum, applied after the codes are found."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = (2**bits - 1) / (high - low)
    codes = torch.where(high > low, (x - low) * scale, 0.0).clamp(0, 2**bits - 1).round()
    values: Tensor = codes / scale.clamp(max=torch.finfo(torch.float16).max).half().float() + low.half().float()
    return values


@contextmanager
def reference_attention(model: PreTrainedModel, config: CompressionConfig) -> Iterator[None]:
    """Let a model attend by the rule of a variant."""

    def run(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attend(config, query[0], key[0], value[0], Call(attention_mask[0, 0] == 0, scale, softcap, s_aux))
        return output.transpose(0, 1)[None], None

    name, before = f"compressed_reference_{next(_names)}", model.config._attn_implementation
    AttentionInterface.register(name, run)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)

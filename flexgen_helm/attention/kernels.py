"""Attention of some queries over one chunk of keys, and the merge of chunks.

Everything here computes a query's numbers from that query and its keys alone, in kernels whose shape does not depend on the
neighbours: query rows are padded to a multiple of 16, and keys always come as whole chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEG_INF = float("-inf")


class ChunkOutput(NamedTuple):
    """What a chunk of keys says: ``output [B, M, H, Dv]`` normalised within the chunk, ``lse [B, M, H]`` in fp32."""

    output: Tensor
    lse: Tensor


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None) -> ChunkOutput:
    """Attend to one chunk.

    Args:
        q: ``[B, H, M, D]``, M a multiple of 16.
        k: ``[B, H_kv, L, D]``, H a multiple of H_kv, L the size of a chunk.
        v: ``[B, H_kv, L, Dv]``.
        mask: Additive, broadcastable to ``[B, 1, M, L]``, of q's dtype; None where every key is seen.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2); None: they stay.
    """
    if q.device.type != "cpu" or softcap is not None or v.shape[-1] > q.shape[-1]:
        return _attend_matmul(q, k, v, mask, scale, softcap)
    dv = v.shape[-1]
    if dv < q.shape[-1]:
        v = torch.nn.functional.pad(v, (0, q.shape[-1] - dv))
    # Private, but the only CPU kernel that returns the log-sum-exp and handles grouped heads (torch 2.13 to 2.15).
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return ChunkOutput(output.transpose(1, 2)[..., :dv], lse.transpose(1, 2))


def _attend_matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> ChunkOutput:
    """The same by hand, for what the fused kernel lacks: softcap, wider values, other devices."""
    b, h, m, _ = q.shape
    groups = h // k.shape[1]
    folded = q.float().reshape(b, k.shape[1], groups * m, -1)
    scores = folded @ k.float().transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = (scores.view(b, h, m, -1) + mask.float()).view(scores.shape)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)
    p = torch.exp(scores - top)
    den = p.sum(-1, keepdim=True)
    output = (p @ v.float()) / den
    lse = (top + torch.log(den)).view(b, h, m)
    return ChunkOutput(output.view(b, h, m, -1).transpose(1, 2), lse.transpose(1, 2))


def merge_chunks(outputs: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Merge the chunks of every query in increasing order of position, in fp32.

    Args:
        outputs: ``[R, T, H, Dv]`` fp32: what each of the T queries got from its r-th chunk, zeros where there is none.
            Overwritten.
        lse: ``[R, T, H]`` fp32, -inf where there is none.
        sinks: ``[H]`` logits of an attention sink (GPT-OSS), or None.

    Returns:
        ``[T, H, Dv]`` fp32.
    """
    top = lse.amax(0)
    weights = torch.exp(lse - top)
    den, total = weights[0], outputs[0]
    if len(outputs) > 1:
        # Whether a kernel fuses product and sum depends on the place in the head at most, never on the neighbours.
        total.mul_(den.unsqueeze(-1))
        for part, weight in zip(outputs[1:], weights[1:], strict=True):
            total.addcmul_(part, weight.unsqueeze(-1))
            den = den + weight
        total /= den.unsqueeze(-1)
    if sinks is not None:
        total *= (1 / (1 + torch.exp(sinks.float() - top) / den)).unsqueeze(-1)
    return total

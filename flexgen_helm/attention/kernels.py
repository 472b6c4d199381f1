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
    """Attention over single chunks of keys.

    Attributes:
        output: ``[B, M, H, Dv]``, normalised within the chunk.
        lse: ``[B, M, H]`` in fp32: log-sum-exp of the scores.
    """

    output: Tensor
    lse: Tensor


def attend_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None) -> ChunkOutput:
    """Attend to B chunks of keys, each with M queries of its own.

    Args:
        q: ``[B, H, M, D]``, M a multiple of 16.
        k: ``[B, H_kv, L, D]``, H a multiple of H_kv, L = 128 the size of a chunk.
        v: ``[B, H_kv, L, Dv]``.
        mask: Additive, broadcastable to ``[B, 1, M, L]``, of q's dtype; None where every key is seen.
        scale: Factor of the scores.
        softcap: Scores become ``softcap * tanh(score / softcap)`` (Gemma 2). None: they stay.
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
    """Do the same in plain products, for softcap, values wider than keys, and devices without the fused kernel."""
    b, h, m, _ = q.shape
    scores = _scores(q, k, mask, scale, softcap)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)
    p = torch.exp(scores - top)
    den = p.sum(-1, keepdim=True)
    output = (p @ v.float()) / den
    lse = (top + torch.log(den)).view(b, h, m)
    return ChunkOutput(output.view(b, h, m, -1).transpose(1, 2), lse.transpose(1, 2))


def score_chunk(q: Tensor, k: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None) -> ChunkOutput:
    """Return the scores of B chunks of keys as outputs ``[B, M, H, L]`` in fp32, -inf where the mask hides a key.

    Args:
        q: See `attend_chunk`; the same for the others.
        k: ``[B, H_kv, L, D]``.
        mask: ``[B, 1, M, L]``.
        scale: Factor of the scores.
        softcap: See `attend_chunk`.
    """
    b, h, m, _ = q.shape
    scores = _scores(q, k, mask, scale, softcap).view(b, h, m, -1).transpose(1, 2)
    return ChunkOutput(scores, scores[..., 0])


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Scores in fp32, heads of K apart: ``[B, H_kv, H / H_kv * M, L]``."""
    b, h, m, _ = q.shape
    scores = q.float().reshape(b, k.shape[1], h // k.shape[1] * m, -1) @ k.float().transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = (scores.view(b, h, m, -1) + mask.float()).view(scores.shape)
    return scores


class Merged(NamedTuple):
    """Attention of T queries over all chunks so far, in fp32: ``total / den``.

    Attributes:
        top: ``[T, H]``: the largest log-sum-exp, relative to which chunks are weighted.
        den: ``[T, H]``: sum of the weights.
        total: ``[T, H, Dv]``: weighted sum of the outputs.
    """

    top: Tensor
    den: Tensor
    total: Tensor


def merge_chunks(before: Merged | None, outputs: Tensor, lse: Tensor) -> Merged:
    """Merge some chunks of every query, in increasing order of position, with those before them.

    Args:
        before: The chunks at earlier positions; overwritten. None: there are none.
        outputs: ``[R, T, H, Dv]`` fp32: output of each of T queries from each of R chunks, zeros where it does not attend.
        lse: ``[R, T, H]`` fp32, -inf where it does not attend.
    """
    top = lse.amax(0)
    if before is not None:
        top = torch.maximum(before.top, top)
    shift = top.masked_fill(top == NEG_INF, 0.0)
    weights = torch.exp(lse - shift)
    if before is None:
        den, total = weights[0], outputs[0] * weights[0].unsqueeze(-1)
        outputs, weights = outputs[1:], weights[1:]
    else:
        rescale = torch.exp(before.top - shift)
        den, total = before.den * rescale, before.total.mul_(rescale.unsqueeze(-1))
    for part, weight in zip(outputs, weights, strict=True):
        # Whether a kernel fuses product and sum depends on the place in the head at most, never on the neighbours.
        total.addcmul_(part, weight.unsqueeze(-1))
        den = den + weight
    return Merged(top, den, total)


def normalised(merged: Merged, sinks: Tensor | None) -> Tensor:
    """Finish a merge: attention ``[T, H, Dv]`` in fp32, zeros for queries that attend to no chunk.

    Args:
        merged: All chunks; overwritten.
        sinks: ``[H]`` logits of an attention sink (GPT-OSS), or None.
    """
    den = merged.den.masked_fill(merged.den == 0, 1.0)
    total = merged.total.div_(den.unsqueeze(-1))
    if sinks is not None:
        total *= (1 / (1 + torch.exp(sinks.float() - merged.top) / den)).unsqueeze(-1)
    return total

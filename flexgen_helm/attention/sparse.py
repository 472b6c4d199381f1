"""Sparse attention (FlexGen section 5): of earlier chunks, each query head reads V of a few keys only.

A query head ranks the keys that its mask shows in earlier chunks by their attention weight and reads V of the first ``percent``
in a hundred, rounded up. For each page it adds the exact weight of the other keys times the mean of the page's values.
FlexGen's own rule has no means, and all keys but a query's own token are candidates. K is read in full by both.

Scores of a row are held at once: 5 bytes for each query, head and key. Decode rows on a CPU
hold those of a few queries at a time (`sparse_decode`), unless they follow FlexGen's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_helm.attention.calls import ChunkCall
from flexgen_helm.attention.chunks import GatheredPages, LocatedPages, compute_call, score_call
from flexgen_helm.attention.kernels import NEG_INF, ChunkOutput
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PAGE_TOKENS
from flexgen_helm.machine.threads import in_threads

TINY = torch.finfo(torch.float32).tiny
QUERIES_AT_ONCE = 16
"""Queries that a thread chooses for at a time."""
SORTED_AT_ONCE = 2**22
"""Scores that are sorted at a time on other devices, which takes about 21 bytes for each."""


class LocatedCall(NamedTuple):
    """A call with its pages."""

    call: ChunkCall
    pages: list[LocatedPages]


class Choice(NamedTuple):
    """What a row's queries read of their keys.

    Attributes:
        scores: ``[T, C, H, 128]`` fp32: for each query, chunk and head the scores of the keys, -inf where there is none.
        read: bool ``[T, C, H, 128]``: the keys of which V is read.
    """

    scores: Tensor
    read: Tensor


def choose(calls: Sequence[LocatedCall], q: Tensor, percent: int, *, scale: float, softcap: float | None) -> Choice:
    """Return what a row's queries read of their keys.

    Args:
        calls: All calls whose keys are candidates.
        q: Queries ``[T, H, D]``.
        percent: Keys of which V is read.
        scale: Factor of the scores.
        softcap: See `flexgen_helm.attention.kernels.attend_chunk`.
    """
    num_chunks = 1 + max((max(each.call.chunks) for each in calls), default=0)
    table = torch.full((len(q), num_chunks, q.shape[1], CHUNK_TOKENS), NEG_INF, device=q.device)
    for call, pages in calls:
        scores = score_call(call, q, pages, scale=scale, softcap=softcap)
        if call.dead is not None:
            scores.masked_fill_(call.dead[:, None, None], NEG_INF)
        table[call.places(len(q), real=True)] = scores
    return Choice(table, _choose(table, percent))


def staged_choices(calls: Sequence[ChunkCall], chosen: Choice, num_pages: int, num_kv: int) -> Tensor:
    """Return which rows of V a row's queries read together: bool ``[num_pages, num_kv, 32]``.

    Args:
        calls: All calls whose keys are candidates.
        chosen: See `choose`.
        num_pages: Staged pages of the row.
        num_kv: K/V heads. A head of V is read by all query heads of its group.
    """
    by_group: Tensor = chosen.read.unflatten(2, (num_kv, -1))
    read = by_group.any(3).float()
    counts = read.new_zeros(num_pages, num_kv, PAGE_TOKENS)
    for call in calls:
        staged = [pages for pages in call.pages if pages.place == "staged"]
        sums = call.page_sums(read, len(read)) if staged else read
        for pages in staged:
            counts.index_add_(0, pages.numbers, sums if pages.which is None else sums[pages.which])
    return counts > 0


def read_call(call: ChunkCall, chosen: Choice, pages: list[LocatedPages], *, means: bool) -> ChunkOutput:
    """Attend to the chunks of a call with the weights and choices of `choose`; returns what `attend_call` does.

    Args:
        call: The call.
        chosen: See `choose`.
        pages: The call's pages.
        means: Whether keys that are not read count with the mean of their page's values.
    """
    at = call.places(len(chosen.scores), real=False)
    picked = torch.cat([chosen.scores[at], chosen.read[at].float()], -1)
    gather = GatheredPages(call, pages, ("v", "mean") if means else ("v",))
    return compute_call(call, picked, gather, _read_with_means if means else _read)


def own_token(qkv: tuple[Tensor, Tensor, Tensor], *, scale: float, softcap: float | None) -> ChunkOutput:
    """Attend with each query to its own token alone: outputs ``[T, H, Dv]`` and log-sum-exps ``[T, H]``, in fp32."""
    q, k, v = (x.float() for x in qkv)
    groups = q.shape[1] // k.shape[1]
    scores = (q * k.repeat_interleave(groups, 1)).sum(-1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return ChunkOutput(v.repeat_interleave(groups, 1), scores)


def _read(picked: Tensor, v: Tensor, mask: Tensor | None) -> ChunkOutput:
    """Weigh the chosen values of B chunks.

    Args:
        picked: ``[B, H, M, 2 * 128]``: scores and choices.
        v: ``[B, H_kv, 128, Dv]``.
        mask: Is in the scores already.
    """
    weights, read, lse = _weigh(picked)
    return ChunkOutput(_fold(weights * read, v), lse)


def _read_with_means(picked: Tensor, v: Tensor, mean: Tensor, mask: Tensor | None) -> ChunkOutput:
    """Do the same, and add the others' weights times the means ``[B, H_kv, 4, Dv]``."""
    weights, read, lse = _weigh(picked)
    others = (weights * (1 - read)).unflatten(-1, (CHUNK_PAGES, -1)).sum(-1)
    return ChunkOutput(_fold(weights * read, v) + _fold(others, mean), lse)


def _weigh(picked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights within a chunk and choices ``[B, H, M, 128]``, and log-sum-exps ``[B, M, H]``."""
    scores, read = picked.split(CHUNK_TOKENS, -1)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == NEG_INF, 0.0)
    weights = torch.exp(scores - top)
    den = weights.sum(-1, keepdim=True).clamp_min(TINY)
    return weights / den, read, (top + torch.log(den)).squeeze(-1).transpose(1, 2)


def _fold(weights: Tensor, v: Tensor) -> Tensor:
    """Product of weights ``[B, H, M, L]`` and ``[B, H_kv, L, Dv]`` in fp32: ``[B, M, H, Dv]``."""
    b, h, m, _ = weights.shape
    product = weights.reshape(b, v.shape[1], h // v.shape[1] * m, -1) @ v.float()
    return product.view(b, h, m, -1).transpose(1, 2)


def _choose(table: Tensor, percent: int) -> Tensor:
    """Whether each key ``[T, C, H, 128]`` is among those with the largest scores; of equal ones the first are."""
    chosen = torch.empty(table.shape, dtype=torch.bool, device=table.device)
    if table.device.type == "cpu":
        from flexgen_helm.attention.sparse_kernel import choose_table

        in_threads(
            lambda part: choose_table(table.numpy()[part], percent, chosen.numpy()[part]), _parts(len(table), QUERIES_AT_ONCE)
        )
    else:
        for part in _parts(len(table), max(1, SORTED_AT_ONCE // table[0].numel())):
            chosen[part] = _choose_sorted(table[part], percent)
    return chosen


def _parts(count: int, size: int) -> list[slice]:
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def _choose_sorted(table: Tensor, percent: int) -> Tensor:
    """`_choose` by sorting."""
    scores = table.transpose(1, 2).flatten(2)
    present = scores > NEG_INF
    wanted = (present.sum(-1, keepdim=True) * percent + 99) // 100
    descending = scores.sort(dim=-1, descending=True).values
    least = descending.gather(-1, (wanted - 1).clamp_min(0))
    larger, equal = scores > least, scores == least
    first = equal & (equal.cumsum(-1) <= wanted - larger.sum(-1, keepdim=True))
    found: Tensor = ((larger | first) & present).unflatten(-1, (-1, CHUNK_TOKENS)).transpose(1, 2)
    return found

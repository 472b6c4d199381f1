"""Attention of one row: append its K and V to the pages, attend chunk by chunk, merge."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_helm.attention.kernels import NEG_INF, ChunkOutput, attend_chunk, merge_chunks
from flexgen_helm.attention.plan import QUERY_PAD, AttentionPlan, ChunkCall, MaskRule, as_index, plan_attention
from flexgen_helm.memory.cache import CacheKey, PagedCache, PageTensors
from flexgen_helm.memory.pages import PAGE_TOKENS
from flexgen_helm.schedule.rows import Row, Segment


class _Writes:
    """Where a row's tokens go among pages of one kind, and which tokens of shared pages are copied beside them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens: list[int] = []
        self._slots: list[int] = []
        self._copies: dict[int, int] = {}

    def add(self, segment: Segment, offset: int) -> None:
        """Take in a segment that begins at ``offset`` in the row."""
        if segment.copy is not None:
            source, target, count = segment.copy
            for i in range(count):
                slot = source * PAGE_TOKENS + i
                # A page copied in this very row is not filled yet: copy from where the token itself is.
                self._copies[target * PAGE_TOKENS + i] = self._copies.get(slot, slot)
        for i, position in enumerate(range(segment.start, segment.end)):
            self._tokens.append(offset + i)
            self._slots.append(segment.table[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)

    def freeze(self) -> None:
        """Make index tensors, once for all layers."""
        self.tokens, self.slots = as_index(self._tokens, self._device), as_index(self._slots, self._device)
        self.sources, self.targets = (
            torch.tensor(list(x), device=self._device, dtype=torch.long) for x in (self._copies.values(), self._copies.keys())
        )

    def apply(self, pages: Tensor, new: Tensor) -> None:
        """Write a layer's new K or V ``[T, H_kv, D]``, then copy into the pages that part here."""
        flat = pages.flatten(0, 1)
        flat[self.slots] = new[self.tokens]
        if len(self.sources):
            flat.index_copy_(0, self.targets, flat.index_select(0, self.sources))


class RowAttention:
    """The attention of one row, layer after layer. Its plan is made once for each mask rule."""

    def __init__(self, row: Row, cache: PagedCache, device: torch.device) -> None:
        self._row, self._cache, self._device = row, cache, device
        self._plans: dict[int, AttentionPlan] = {}
        self._writes: dict[bool, _Writes] = {}
        offset = 0
        for segment in row.segments:
            self._writes.setdefault(segment.kept, _Writes(device)).add(segment, offset)
            offset += len(segment.tokens)
        for writes in self._writes.values():
            writes.freeze()

    def attend(
        self,
        key: CacheKey,
        qkv: tuple[Tensor, Tensor, Tensor],
        rule: MaskRule,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of the row's tokens in one layer.

        Args:
            key: Layer and attention call.
            qkv: Queries ``[T, H, D]``, keys ``[T, H_kv, D]``, values ``[T, H_kv, Dv]``, positions already encoded.
            rule: The layer's mask; the same object for all layers that share it.
            scale: Factor of the scores.
            softcap: See `attend_chunk`.
            sinks: ``[H]`` logits, see `merge_chunks`.

        Returns:
            ``[T, H, Dv]`` in the dtype of the values.
        """
        q, k, v = qkv
        stores = {kept: self._cache.tensors(key, k, v, kept=kept) for kept in self._writes}
        for kept, writes in self._writes.items():
            writes.apply(stores[kept].k, k)
            writes.apply(stores[kept].v, v)
        plan = self._plan(rule, q)
        shape = (plan.num_ranks, *q.shape[:2])
        outputs = torch.empty(*shape, v.shape[-1], dtype=torch.float32, device=q.device)
        lse = torch.full(shape, NEG_INF, dtype=torch.float32, device=q.device)
        outputs.flatten(0, 1)[plan.absent] = 0.0
        lse[0, plan.idle] = 0.0
        for call in plan.calls:
            run = _single if call.single else _stacked
            part = run(call, q, stores[call.kept], scale, softcap)
            if call.dead is not None:
                part.output.masked_fill_(call.dead[:, None, None], 0.0)
                part.lse.masked_fill_(call.dead[:, None], NEG_INF)
            outputs.flatten(0, 1)[call.outputs] = part.output.float()
            lse.flatten(0, 1)[call.outputs] = part.lse
        return merge_chunks(outputs, lse, sinks).to(v.dtype)

    def _plan(self, rule: MaskRule, q: Tensor) -> AttentionPlan:
        if id(rule) not in self._plans:
            self._plans[id(rule)] = plan_attention(self._row, rule, dtype=q.dtype, device=self._device)
        return self._plans[id(rule)]


def _gather(pages: Tensor, call: ChunkCall) -> Tensor:
    """Pages of a call as ``[B, H_kv, L, D]``."""
    return pages[call.pages].view(call.num_chunks, -1, *pages.shape[2:]).transpose(1, 2)


def _stacked(call: ChunkCall, q: Tensor, store: PageTensors, scale: float, softcap: float | None) -> ChunkOutput:
    """Many queries over each chunk; returns ``[queries, H, Dv]`` and ``[queries, H]``."""
    picked = q[call.queries].unflatten(0, (call.num_chunks, -1)).transpose(1, 2)
    output, lse = attend_chunk(picked, _gather(store.k, call), _gather(store.v, call), call.mask, scale=scale, softcap=softcap)
    return ChunkOutput(output.flatten(0, 1)[call.real], lse.flatten(0, 1)[call.real])


def _single(call: ChunkCall, q: Tensor, store: PageTensors, scale: float, softcap: float | None) -> ChunkOutput:
    """One query over each chunk: the query heads of a K/V head are the rows of one product."""
    b, h, kv = call.num_chunks, q.shape[1], store.k.shape[2]
    groups = h // kv
    padded = q.new_zeros(b, kv, -(-groups // QUERY_PAD) * QUERY_PAD, q.shape[2])
    padded[:, :, :groups] = q[call.queries].reshape(b, kv, groups, -1)
    output, lse = attend_chunk(padded, _gather(store.k, call), _gather(store.v, call), call.mask, scale=scale, softcap=softcap)
    return ChunkOutput(output[:, :groups].transpose(1, 2).reshape(b, h, -1), lse[:, :groups].transpose(1, 2).reshape(b, h))

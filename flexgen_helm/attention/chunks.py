"""A plan's calls, computed over pages wherever they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_helm.attention.calls import ChunkCall
from flexgen_helm.attention.kernels import ChunkOutput, attend_chunk
from flexgen_helm.attention.row_pages import CHUNK_PAGES, CHUNK_TOKENS
from flexgen_helm.attention.visits import QUERY_PAD
from flexgen_helm.memory.page_tensors import PageTensors
from flexgen_helm.memory.pages import PAGE_TOKENS

GATHERED_BYTES = 256 << 20
"""K and V that are gathered at a time."""
GATHERED_BYTES_PER_THREAD = 1 << 20
"""The same on a CPU, in whose cache they stay (runs/LOG.md)."""


class LocatedPages(NamedTuple):
    """Pages of a call that are at one place, see `PagePart`."""

    tensors: PageTensors
    numbers: Tensor
    """Where they are in the tensors."""
    which: Tensor | None


Kernel = Callable[[ChunkCall, Tensor, list[LocatedPages]], ChunkOutput]
"""`attend_call` with a layer's scale and softcap."""


def attend_call(call: ChunkCall, q: Tensor, pages: list[LocatedPages], *, scale: float, softcap: float | None) -> ChunkOutput:
    """What the chunks of a call say to a row's queries ``[T, H, D]``: ``[queries, H, Dv]`` and ``[queries, H]``.

    Chunks are met group by group, and no chunk's numbers depend on the others in its group.
    """
    gather = _Gather(call, pages)
    num_kv = pages[0].tensors.k.shape[1]
    picked = q[call.queries].view(call.num_chunks, -1, *q.shape[1:])
    parts: list[ChunkOutput] = []
    for first in range(0, call.num_chunks, gather.size):
        group = slice(first, first + gather.size)
        queries = (_single_queries if call.single else _stacked_queries)(picked[group], num_kv)
        mask = None if call.mask is None else call.mask[group]
        k, v = gather(group)
        part = attend_chunk(queries, k, v, mask, scale=scale, softcap=softcap)
        parts.append(_single_output(part, q.shape[1]) if call.single else part)
    output, lse = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
    return ChunkOutput(output.flatten(0, 1)[call.real], lse.flatten(0, 1)[call.real])


def _stacked_queries(picked: Tensor, num_kv: int) -> Tensor:
    """From ``[B, M, H, D]`` to ``[B, H, M, D]``."""
    return picked.transpose(1, 2)


def _single_queries(picked: Tensor, num_kv: int) -> Tensor:
    """From ``[B, 1, H, D]`` to ``[B, H_kv, 16, D]``: the query heads of a K/V head are the rows of one product."""
    b, _, h, d = picked.shape
    groups = h // num_kv
    padded = picked.new_zeros(b, num_kv, -(-groups // QUERY_PAD) * QUERY_PAD, d)
    padded[:, :, :groups] = picked.view(b, num_kv, groups, d)
    return padded


def _single_output(part: ChunkOutput, num_heads: int) -> ChunkOutput:
    """Back from ``[B, 16, H_kv, Dv]`` to ``[B, 1, H, Dv]``, likewise the log-sum-exps."""
    b, _, num_kv, dim = part.output.shape
    groups = num_heads // num_kv
    output = part.output[:, :groups].transpose(1, 2).reshape(b, 1, num_heads, dim)
    return ChunkOutput(output, part.lse[:, :groups].transpose(1, 2).reshape(b, 1, num_heads))


class _Gather:
    """Brings the pages of a call's chunks side by side: K and V ``[B, H_kv, 128, D]`` of a group of B chunks."""

    def __init__(self, call: ChunkCall, pages: list[LocatedPages]) -> None:
        self._pages, self._num_kv = pages, pages[0].tensors.k.shape[1]
        on_cpu = pages[0].tensors.k.device.type == "cpu"
        at_once = GATHERED_BYTES_PER_THREAD * torch.get_num_threads() if on_cpu else GATHERED_BYTES
        chunk_bytes = sum(x[0].nbytes for x in pages[0].tensors) * CHUNK_PAGES
        self.size = max(1, at_once // chunk_bytes) if len(pages) == 1 else call.num_chunks
        """Chunks in a group. Those whose pages are at several places are few: one group."""
        self._heads = torch.arange(self._num_kv, device=pages[0].numbers.device)
        self._sources = [[_heads_first(x) for x in part.tensors] for part in pages]
        rows = min(self.size, call.num_chunks) * self._num_kv * CHUNK_PAGES
        self._memory = [x.new_empty(rows, x.shape[1]) for x in self._sources[0]]

    def __call__(self, group: slice) -> list[Tensor]:
        if len(self._pages) == 1:
            chunks = self._pages[0].numbers.view(-1, 1, CHUNK_PAGES)[group]
            rows = (chunks * self._num_kv + self._heads[:, None]).flatten()
            gathered = [memory[: len(rows)] for memory in self._memory]
            for source, target in zip(self._sources[0], gathered, strict=True):
                torch.index_select(source, 0, rows, out=target)
        else:
            gathered = self._memory
            for sources, (_, numbers, which) in zip(self._sources, self._pages, strict=True):
                assert which is not None
                chunks, places = (which // CHUNK_PAGES)[:, None], (which % CHUNK_PAGES)[:, None]
                targets = ((chunks * self._num_kv + self._heads) * CHUNK_PAGES + places).flatten()
                rows = (numbers[:, None] * self._num_kv + self._heads).flatten()
                for source, target in zip(sources, gathered, strict=True):
                    target.index_copy_(0, targets, source.index_select(0, rows))
        return [x.view(-1, self._num_kv, CHUNK_TOKENS, x.shape[1] // PAGE_TOKENS) for x in gathered]


def _heads_first(pages: Tensor) -> Tensor:
    """Pages ``[pages, H_kv, 32, D]`` as rows of one page and head."""
    return pages.view(pages.shape[0] * pages.shape[1], -1)

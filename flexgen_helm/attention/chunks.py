"""A plan's calls, computed over pages at any place and in any form: what a format gathers is what kernels read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_helm.attention.calls import ChunkCall
from flexgen_helm.attention.kernels import ChunkOutput, attend_chunk, score_chunk
from flexgen_helm.attention.visits import QUERY_PAD
from flexgen_helm.kv_cache.page_format import PageTensors, PartName
from flexgen_helm.kv_cache.pages import CHUNK_PAGES

GATHERED_BYTES = 32 << 20
"""Bytes of K and V that are gathered at a time on a GPU."""
GATHERED_BYTES_PER_THREAD = 1 << 20
"""Bytes of K and V that are gathered at a time and thread on a CPU, in whose cache they stay (runs/LOG.md)."""


class LocatedPages(NamedTuple):
    """Those pages of a call that are at one place, P of the call's 4 * B.

    Attributes:
        tensors: The pages of the place.
        numbers: ``[P]``: their numbers in the tensors.
        which: ``[P]``: see `PlacedPages.which`.
        means: ``[P]``: numbers of the pages' means. None: they have none.
    """

    tensors: PageTensors
    numbers: Tensor
    which: Tensor | None
    means: Tensor | None = None

    def numbers_of(self, name: PartName) -> Tensor:
        """The numbers of the pages in the tensor of a part, or of the means."""
        return self.numbers if name != "mean" or self.means is None else self.means


def attend_call(call: ChunkCall, q: Tensor, pages: list[LocatedPages], *, scale: float, softcap: float | None) -> ChunkOutput:
    """Attend to the chunks of a call with a row's queries ``[T, H, D]``.

    Returns:
        Outputs ``[N, H, Dv]`` and log-sum-exps ``[N, H]`` of the call's real queries.
    """
    kernel = partial(attend_chunk, scale=scale, softcap=softcap)
    return compute_call(call, q[call.queries], GatheredPages(call, pages, ("k", "v")), kernel)


def score_call(call: ChunkCall, q: Tensor, pages: list[LocatedPages], *, scale: float, softcap: float | None) -> Tensor:
    """Return the scores ``[N, H, 128]`` of a call's real queries, in fp32, -inf for keys that the mask hides."""
    kernel = partial(score_chunk, scale=scale, softcap=softcap)
    return compute_call(call, q[call.queries], GatheredPages(call, pages, ("k",)), kernel).output


def compute_call(call: ChunkCall, picked: Tensor, gather: GatheredPages, kernel: Callable[..., ChunkOutput]) -> ChunkOutput:
    """Compute the chunks of a call.

    Chunks are computed group by group, and no chunk's numbers depend on the others in its group.

    Args:
        call: The call.
        picked: ``[B * M, H, D]``: what each padded query is, be it the query itself.
        gather: Brings the parts of pages that the kernel reads.
        kernel: Takes queries, these parts and a mask, as `attend_chunk` does.

    Returns:
        Outputs ``[N, H, D]`` and log-sum-exps ``[N, H]`` of the call's real queries.
    """
    num_kv, num_heads = gather.num_kv, picked.shape[1]
    picked = picked.view(call.num_chunks, -1, *picked.shape[1:])
    parts: list[ChunkOutput] = []
    for first in range(0, call.num_chunks, gather.size):
        group = slice(first, first + gather.size)
        queries = (_single_queries if call.single else _stacked_queries)(picked[group], num_kv)
        mask = None if call.mask is None else call.mask[group]
        part = kernel(queries, *gather(group), mask)
        parts.append(_single_output(part, num_heads) if call.single else part)
    output, lse = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
    return ChunkOutput(output.flatten(0, 1)[call.real], lse.flatten(0, 1)[call.real])


def _stacked_queries(picked: Tensor, num_kv: int) -> Tensor:
    """Put heads first: ``[B, M, H, D]`` to ``[B, H, M, D]``."""
    return picked.transpose(1, 2)


def _single_queries(picked: Tensor, num_kv: int) -> Tensor:
    """Make the query heads of a K/V head the rows of one product: ``[B, 1, H, D]`` to ``[B, H_kv, 16, D]``, padded."""
    b, _, h, d = picked.shape
    groups = h // num_kv
    padded = picked.new_zeros(b, num_kv, -(-groups // QUERY_PAD) * QUERY_PAD, d)
    padded[:, :, :groups] = picked.view(b, num_kv, groups, d)
    return padded


def _single_output(part: ChunkOutput, num_heads: int) -> ChunkOutput:
    """Undo `_single_queries`: ``[B, 16, H_kv, Dv]`` to ``[B, 1, H, Dv]``, likewise the log-sum-exps."""
    b, _, num_kv, dim = part.output.shape
    groups = num_heads // num_kv
    output = part.output[:, :groups].transpose(1, 2).reshape(b, 1, num_heads, dim)
    return ChunkOutput(output, part.lse[:, :groups].transpose(1, 2).reshape(b, 1, num_heads))


class GatheredPages:
    """Brings parts of the pages of a call's chunks side by side, for a group of B chunks.

    K and V are ``[B, H_kv, 128, D]``, means of V ``[B, H_kv, 4, D]``.
    """

    def __init__(self, call: ChunkCall, pages: list[LocatedPages], names: Sequence[PartName]) -> None:
        """Take memory for a group.

        Args:
            call: The call.
            pages: Its pages.
            names: The parts.
        """
        stored = pages[0].tensors
        self._pages, self.num_kv = pages, stored.format.k.num_heads
        self._names, self._parts = names, [stored.part(name)[0] for name in names]
        device = stored.k.device
        at_once = GATHERED_BYTES_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else GATHERED_BYTES
        chunk_bytes = CHUNK_PAGES * sum(part.num_heads * part.num_rows * part.dim * part.dtype.itemsize for part in self._parts)
        self.size = max(1, at_once // chunk_bytes) if len(pages) == 1 else call.num_chunks
        """Chunks in a group. Calls whose pages are at several places have few: one group."""
        self._heads = torch.arange(self.num_kv, device=pages[0].numbers.device)
        rows = min(self.size, call.num_chunks) * self.num_kv * CHUNK_PAGES
        self._memory = [torch.empty(rows, part.num_rows * part.dim, dtype=part.dtype, device=device) for part in self._parts]

    def __call__(self, group: slice) -> list[Tensor]:
        """Bring the parts of some chunks."""
        gathered = self._of_one_place(group) if len(self._pages) == 1 else self._of_several_places()
        shapes = [(self.num_kv, CHUNK_PAGES * part.num_rows, part.dim) for part in self._parts]
        return [x.view(-1, *shape) for x, shape in zip(gathered, shapes, strict=True)]

    def _of_one_place(self, group: slice) -> list[Tensor]:
        pages, numbers, gathered = self._pages[0], None, []
        for name, memory in zip(self._names, self._memory, strict=True):
            if numbers is not pages.numbers_of(name):
                numbers = pages.numbers_of(name)
                rows = (numbers.view(-1, 1, CHUNK_PAGES)[group] * self.num_kv + self._heads[:, None]).flatten()
            part, stored = pages.tensors.part(name)
            gathered.append(part.gather(stored, rows, memory[: len(rows)]))
        return gathered

    def _of_several_places(self) -> list[Tensor]:
        for pages in self._pages:
            assert pages.which is not None
            chunks, places = (pages.which // CHUNK_PAGES)[:, None], (pages.which % CHUNK_PAGES)[:, None]
            targets = ((chunks * self.num_kv + self._heads) * CHUNK_PAGES + places).flatten()
            for name, target in zip(self._names, self._memory, strict=True):
                rows = (pages.numbers_of(name)[:, None] * self.num_kv + self._heads).flatten()
                part, stored = pages.tensors.part(name)
                target.index_copy_(0, targets, part.gather(stored, rows))
        return self._memory

"""Measure attention as rows do it: over pages, on the device and on the CPU beside it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_helm.attention.decode import DecodeAttention
from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.paged import trial
from flexgen_helm.attention.row import RowAttention
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.cache_format import CacheFormat
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import CHUNK_PAGES, CHUNK_TOKENS, PageCounts, PageStorage, num_pages
from flexgen_helm.machine.profile import AttentionRate, Place, RowKind
from flexgen_helm.machine.rates import random_numbers
from flexgen_helm.machine.rounds import Rounds, rate_of, seconds_of
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.schedule.rows import Row, Segment

CAUSAL = MaskRule(lambda q, k: k <= q, True)
KEY = CacheKey(0, 0)
DECODE_NUMBERS = {"cpu": 2**23, "cuda": 2**28}
"""By type of device: numbers of K and of V each that a decode row reads, about: more than caches hold."""
DECODE_TOKENS = 16 * CHUNK_TOKENS - 1
"""Position of the token of each sequence of a decode row: the last one of its sixteenth chunk."""
PREFILL_START = 8 * CHUNK_TOKENS
"""Tokens in front of those of a prefill row."""


@dataclass(frozen=True)
class Heads:
    """Heads of an attention call."""

    queries: int = 32
    keys: int = 8
    dim: int = 128


def decode_rate(place: Place, device: Device, name: str, form: tuple[torch.dtype, CacheFormat], heads: Heads) -> AttentionRate:
    """Measure a decode row whose sequences share nothing.

    Args:
        place: "host": the CPU attends beside the device.
        device: The device.
        name: Name of the form.
        form: Dtype of exact pages, and the format of the cache.
        heads: Heads.
    """
    where = CPU.torch_device if place == "host" else device.torch_device
    size = max(1, DECODE_NUMBERS[where.type] // (DECODE_TOKENS * heads.keys * heads.dim))
    row = _Row("decode", [DECODE_TOKENS] * size, 1, heads, where, form)
    rate = rate_of(row.stored_bytes, seconds_of(row.attend, where))
    row.close()
    return AttentionRate(place, "decode", name, rate, row.kernel)


def prefill_rates(
    device: Device, forms: Mapping[str, CacheFormat], dtype: torch.dtype, tokens: int, heads: Heads
) -> Iterator[AttentionRate]:
    """Measure prefill rows of one sequence behind a long beginning.

    Sparse attention scores all keys of earlier chunks, chooses among the scores and reads V of the chosen keys. Each of these
    takes time for every query and key, so it has a rate as dense attention has, but of the keys of earlier chunks alone: a
    query reads its own chunk in full, which takes as long as in the first format.

    Args:
        device: The device.
        forms: Formats of the cache by name, a dense one first.
        dtype: Of exact pages.
        tokens: Size of the row.
        heads: Heads.
    """
    own = tokens * CHUNK_TOKENS
    keys = sum((PREFILL_START + i) // CHUNK_TOKENS + 1 for i in range(tokens)) * CHUNK_TOKENS
    dense: Rounds | None = None
    for name, form in forms.items():
        row = _Row("prefill", [PREFILL_START], tokens, heads, device.torch_device, (dtype, form))
        found = seconds_of(row.attend, device.torch_device)
        row.close()
        dense = dense or found
        sparse = form.sparsity is not None
        counted = keys - own if sparse else keys
        seconds = _without(found, dense, own / keys) if sparse else found
        rate = rate_of(4 * counted * heads.queries * heads.dim, seconds)
        yield AttentionRate("device", "prefill", name, rate, row.kernel)


def _without(rounds: Rounds, dense: Rounds, part: float) -> Rounds:
    """Return seconds without those of the keys that are read in full: a part of all, no slower than the others."""
    wall, processor = (
        [each - part * min(each, statistics.median(full)) for each in some] if some else []
        for some, full in zip(rounds, dense, strict=True)
    )
    return Rounds(wall, processor)


class _Row:
    """A row and its pages, all on the device that attends."""

    def __init__(
        self,
        kind: RowKind,
        starts: list[int],
        tokens: int,
        heads: Heads,
        where: torch.device,
        form: tuple[torch.dtype, CacheFormat],
    ) -> None:
        dtype, cache_format = form
        count = num_pages(0, starts[0] + tokens)
        tables = [list(range(i * count, (i + 1) * count)) for i in range(len(starts))]
        segments = [
            Segment((0,) * tokens, start, table, exact=table if cache_format.seals else None)
            for start, table in zip(starts, tables, strict=True)
        ]
        self._cache = PagedCache(cache_format=cache_format)
        kept = PageStorage(PageCounts(count * len(starts)))
        self._cache.reserve({"exact": kept, "sealed": kept})
        row = Row(kind, tokens * len(starts), segments)
        pages = RowPages(row, self._cache.page_maps)
        self._decode = DecodeAttention() if kind == "decode" and where.type == "cpu" else None
        shape = trial.HeadShape(heads.queries, heads.keys, heads.dim, heads.dim)
        kernel = trial.paged_kernel(where, shape, cache_format, dtype)
        self.kernel = "" if where.type == "cpu" else "torch" if kernel is None else "triton"
        """What attends, if it is no CPU."""
        self._attention = RowAttention(pages, self._cache, where, self._decode, attend_tiles=kernel)
        shapes = [(row.size, number, heads.dim) for number in (heads.queries, heads.keys, heads.keys)]
        self._qkv = _three([random_numbers(shape, where, dtype) for shape in shapes])
        self._scale = 1 / math.sqrt(heads.dim)
        stores = self._cache.tensors(KEY, *self._qkv[1:], {form: {"device"} for form in self._cache.page_maps})
        exact = stores["exact"]["device"]
        for x in exact.tensors:
            x.copy_(random_numbers(tuple(x.shape), where, dtype))
        num_chunks = len(starts) * (count // CHUNK_PAGES)
        self.stored_bytes = num_chunks * CHUNK_PAGES * exact.format.num_bytes
        """Bytes of K and V that are read."""
        if cache_format.seals:
            sealed = stores["sealed"]["device"]
            numbers = torch.arange(count * len(starts), device=where)
            for (part, stored), x in zip(sealed.sealable_parts, exact.tensors, strict=True):
                part.seal(stored, numbers, x)
            own = CHUNK_PAGES * exact.format.num_bytes
            self.stored_bytes = len(starts) * own + (num_chunks - len(starts)) * CHUNK_PAGES * sealed.format.num_bytes

    def attend(self) -> None:
        """Store the row's K and V, and attend."""
        with torch.inference_mode():
            self._attention.attend(KEY, self._qkv, CAUSAL, scale=self._scale, softcap=None, sinks=None)

    def close(self) -> None:
        """End the threads."""
        if self._decode is not None:
            self._decode.close()
        self._cache.close()


def _three(found: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = found
    return q, k, v

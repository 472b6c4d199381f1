"""Whether the kernel serves a model on a device: it compiles, equals attention by hand, and is bit-stable (level B)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flexgen_helm.attention.masks import MaskRule
from flexgen_helm.attention.row import AttendTiles, RowAttention
from flexgen_helm.attention.row_pages import RowPages
from flexgen_helm.kv_cache.cache_format import CacheFormat
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, PageCounts, PageStorage
from flexgen_helm.schedule.rows import Row, Segment

logger = logging.getLogger(__name__)

KEY = CacheKey(0, 0)
CAUSAL = MaskRule(lambda q, k: k <= q, True)
PROMPTS = (300, 70)
"""Tokens of two sequences: several chunks, and less than one."""
ROW_STEP = 16
"""Row sizes are multiples of it."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference of numbers from -1 to 1: the kernel rounds weights to the dtype, attention by hand does not."""


class HeadShape(NamedTuple):
    """The heads of an attention call.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: K/V heads.
        dim: Elements of a head of queries and keys.
        value_dim: Elements of a head of values.
    """

    num_heads: int
    num_kv_heads: int
    dim: int
    value_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads} and {self.num_kv_heads} heads of {self.dim}, values of {self.value_dim}"


@functools.cache
def paged_kernel(device: torch.device, shape: HeadShape, cache_format: CacheFormat, dtype: torch.dtype) -> AttendTiles | None:
    """Return the kernel if it serves; None, with the reason logged, if attention is computed by hand.

    Args:
        device: The device that computes.
        shape: Heads of an attention call.
        cache_format: Form of K and V.
        dtype: Dtype in which attention reads them.
    """
    if device.type != "cuda" or cache_format.sparsity is not None or cache_format.flexgen:
        return None
    try:
        from flexgen_helm.attention.paged.attention import attend_row

        require_equal(attend_row, device, shape, cache_format, dtype)
    except Exception as error:  # compilers raise anything
        logger.warning("attention is computed by hand, since the Triton kernel does not serve here for %s: %s", shape, error)
        return None
    return attend_row


def require_equal(
    attend: AttendTiles, device: torch.device, shape: HeadShape, cache_format: CacheFormat, dtype: torch.dtype
) -> None:
    """Compare the kernel with attention by hand, and two sequences in a row with each alone.

    Raises:
        RuntimeError: If they differ.
    """
    both = list(range(len(PROMPTS)))
    found, expected = (Trial(device, shape, cache_format, dtype).outputs(both, kernel) for kernel in (attend, None))
    worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(found, expected, strict=True))
    if not worst <= TOLERANCE[dtype]:
        raise RuntimeError(f"it differs from attention by hand by {worst:.3g}")
    for i, output in enumerate(found):
        (alone,) = Trial(device, shape, cache_format, dtype).outputs([i], attend)
        if not torch.equal(alone, output):
            raise RuntimeError("a sequence alone has other bits than beside another one")


class Trial:
    """Sequences of random numbers in pages of their own."""

    def __init__(
        self,
        device: torch.device,
        shape: HeadShape,
        cache_format: CacheFormat,
        dtype: torch.dtype,
        lengths: Sequence[int] = PROMPTS,
    ) -> None:
        """Store nothing yet.

        Args:
            device: The device that attends.
            shape: Heads.
            cache_format: Form of K and V.
            dtype: Dtype of queries, K and V.
            lengths: Tokens of the sequences.
        """
        chance = torch.Generator().manual_seed(0)
        kv = shape.num_kv_heads
        heads = ((shape.num_heads, shape.dim), (kv, shape.dim), (kv, shape.value_dim))
        self._inputs = [[(2 * torch.rand(n, *each, generator=chance) - 1).to(device, dtype) for each in heads] for n in lengths]
        self._cache, self._device, self._lengths = PagedCache(cache_format=cache_format), device, lengths
        self._seals, self._scale = cache_format.seals, shape.dim**-0.5
        self._tables: list[list[int]] = []
        for n in lengths:
            begin = sum(map(len, self._tables))
            self._tables.append(list(range(begin, begin - (-n // PAGE_TOKENS))))
        storage = PageStorage(PageCounts(sum(map(len, self._tables))))
        self._cache.reserve({"exact": storage, "sealed": storage})

    def outputs(self, which: list[int], kernel: AttendTiles | None) -> list[Tensor]:
        """Return attention of all tokens of some sequences: prompts in one row, their last tokens in a decode row."""
        prompts, last = self.prompts(which, kernel)(), self.last_tokens(which, kernel)()
        return [torch.cat(parts) for parts in zip(prompts, last, strict=True)]

    def prompts(self, which: list[int], kernel: AttendTiles | None) -> Callable[[], list[Tensor]]:
        """Return what attends with all tokens but the last of some sequences, planned once; None: by hand."""
        return self._row("prefill", [(i, 0, self._lengths[i] - 1) for i in which], kernel)

    def last_tokens(self, which: list[int], kernel: AttendTiles | None) -> Callable[[], list[Tensor]]:
        """Return what attends with the last token of some sequences, as `prompts` does."""
        return self._row("decode", [(i, self._lengths[i] - 1, self._lengths[i]) for i in which], kernel)

    def _row(
        self, kind: Literal["prefill", "decode"], pieces: list[tuple[int, int, int]], kernel: AttendTiles | None
    ) -> Callable[[], list[Tensor]]:
        counts = [b - a for _, a, b in pieces]
        segments = [
            Segment((0,) * (b - a), a, self._tables[i], exact=self._tables[i] if self._seals else None) for i, a, b in pieces
        ]
        size = -(-sum(counts) // ROW_STEP) * ROW_STEP
        pages = RowPages(Row(kind, size, segments), self._cache.page_maps)
        attention = RowAttention(pages, self._cache, self._device, attend_tiles=kernel)
        parts = (torch.cat([self._inputs[i][x][a:b] for i, a, b in pieces]) for x in range(3))
        q, k, v = (torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]) for x in parts)

        def attend() -> list[Tensor]:
            found = attention.attend(KEY, (q, k, v), CAUSAL, scale=self._scale, softcap=None, sinks=None)
            return list(found[: sum(counts)].split(counts))

        return attend

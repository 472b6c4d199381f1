"""K and V of every page: one tensor pair per (layer, attention call) where they are kept, one shared pair where they are not.

Work that generates at most one token needs K and V only inside the layer being computed, since a block is traversed column
by column: its pages are *transient*, and every layer writes over the last one's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_helm.memory.pages import PAGE_TOKENS


class CacheKey(NamedTuple):
    """An attention call: some layers attend more than once."""

    layer: int
    call: int


class PageTensors(NamedTuple):
    """K ``[pages, 32, num_kv_heads, head_dim]`` and V (its own head size) of one attention call."""

    k: Tensor
    v: Tensor


GROWTH = 1.5
"""Kept storage that is too small is made larger by at least this factor, since growing copies what is stored."""


class PagedCache:
    """Storage behind the page numbers of a scheduler. Grows with the highest page in use."""

    def __init__(self, capacity: int | None = None) -> None:
        """Nothing is allocated yet; kept pages will never be more than ``capacity``."""
        self._capacity = capacity
        self._kept: dict[CacheKey, PageTensors] = {}
        self._transient: dict[tuple[int, torch.Size, torch.Size], PageTensors] = {}
        self._pages = {True: 0, False: 0}
        self.bytes_per_token: dict[CacheKey, int] = {}
        """Bytes of K and V of one token in each attention call, known once a row went through all layers."""

    def reserve(self, *, kept: int, transient: int) -> None:
        """Make room for pages numbered below these; tensors follow at their next use."""
        if kept > self._pages[True]:
            grown = max(kept, int(GROWTH * self._pages[True]))
            self._pages[True] = grown if self._capacity is None else min(grown, self._capacity)
        self._pages[False] = max(self._pages[False], transient)

    def tensors(self, key: CacheKey, k: Tensor, v: Tensor, *, kept: bool) -> PageTensors:
        """Storage of one attention call, for tokens whose K and V look like ``k`` and ``v`` ``[tokens, heads, dim]``."""
        self.bytes_per_token[key] = (k[0].numel() + v[0].numel()) * k.element_size()
        if kept:
            self._kept[key] = _grown(self._kept.get(key), self._pages[True], k, v)
            return self._kept[key]
        shape = (key.call, k.shape[1:], v.shape[1:])
        self._transient[shape] = _grown(self._transient.get(shape), self._pages[False], k, v)
        return self._transient[shape]


def _grown(old: PageTensors | None, pages: int, k: Tensor, v: Tensor) -> PageTensors:
    if old is not None and old.k.shape[0] >= pages:
        return old
    # Zeros: what is masked is multiplied by 0, which must not meet a NaN of uninitialised memory.
    new = PageTensors(*(torch.zeros(pages, PAGE_TOKENS, *x.shape[1:], dtype=x.dtype, device=x.device) for x in (k, v)))
    if old is not None:
        for source, target in zip(old, new, strict=True):
            target[: source.shape[0]] = source
    return new

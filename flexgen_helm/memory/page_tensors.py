"""Tensors that hold pages, heads first, so that the keys of a head are read in one stretch."""

from __future__ import annotations

from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_helm.memory.buffers import lazy_zeros
from flexgen_helm.memory.pages import PAGE_TOKENS

GROWTH = 1.5
"""Kept storage that is too small is made larger by at least this factor, since growing copies what is stored."""


class CacheKey(NamedTuple):
    """An attention call: some layers attend more than once."""

    layer: int
    call: int


class PageTensors(NamedTuple):
    """K ``[pages, num_kv_heads, 32, head_dim]`` and V (its own head size) of one attention call."""

    k: Tensor
    v: Tensor


class PageShape(NamedTuple):
    """What one page of an attention call is made of."""

    k: tuple[int, int]
    """Heads and head size."""
    v: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    """Where attention is computed."""

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> PageShape:
        """The shape of pages for tokens ``[T, heads, dim]``."""
        return cls((k.shape[1], k.shape[2]), (v.shape[1], v.shape[2]), k.dtype, k.device)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes of a page's K and of its V."""
        size = PAGE_TOKENS * self.dtype.itemsize
        return self.k[0] * self.k[1] * size, self.v[0] * self.v[1] * size

    @property
    def num_bytes_per_token(self) -> int:
        """Bytes of one token's K and V."""
        return sum(self.num_bytes) // PAGE_TOKENS

    def allocate(self, pages: int, device: torch.device, old: list[Tensor] | None = None) -> PageTensors:
        """Tensors of zeros: what is masked is multiplied by 0, which must not meet a NaN of uninitialised memory.

        Args:
            pages: How many.
            device: Where.
            old: K and V that the first pages hold. They leave the list as they are copied, so that never both are there twice.
        """
        new = []
        for heads, dim in (self.k, self.v):
            num_bytes = pages * heads * PAGE_TOKENS * dim * self.dtype.itemsize
            zeros = lazy_zeros(num_bytes) if device.type == "cpu" else torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            new.append(zeros.view(self.dtype).view(pages, heads, PAGE_TOKENS, dim))
            if old:
                new[-1][: len(old[0])] = old[0]
                del old[0]
        return PageTensors(*new)

    def view(self, k: Tensor, v: Tensor) -> PageTensors:
        """Bytes ``[pages, bytes]`` of K and of V, one page a row, as what they mean."""
        parts = ((k, self.k), (v, self.v))
        return PageTensors(*(x.view(self.dtype).unflatten(1, (heads, PAGE_TOKENS, dim)) for x, (heads, dim) in parts))


class GrowingPages:
    """Tensors of one kind of pages, which grow with the highest number in use."""

    def __init__(self, capacity: int | None, *, device: torch.device | None = None) -> None:
        """Nothing is allocated yet.

        Args:
            capacity: There will never be more pages; None: no bound.
            device: Where they are; None: where attention is computed.
        """
        self._capacity, self._device = capacity, device
        self.num_bytes = 0
        """That all tensors take when their pages are in use."""
        self._pages = 0
        self._tensors: dict[tuple[CacheKey, PageShape], PageTensors] = {}

    def reserve(self, pages: int) -> None:
        """Make room for pages numbered below this; tensors follow at their next use."""
        if pages > self._pages:
            grown = max(pages, int(GROWTH * self._pages))
            self._pages = grown if self._capacity is None else min(grown, self._capacity)

    def tensors(self, key: CacheKey, shape: PageShape) -> PageTensors:
        """Storage of one attention call."""
        found = self._tensors.get((key, shape))
        if found is not None and len(found.k) >= self._pages:
            return found
        del found
        new = shape.allocate(self._pages, self._device or shape.device, list(self._tensors.pop((key, shape), ())))
        self._tensors[key, shape] = new
        self.num_bytes = sum(x.nbytes for tensors in self._tensors.values() for x in tensors)
        return new


class HostPages(GrowingPages):
    """Pages in host memory. In transfers all K comes first, then all V."""

    def __init__(self, capacity: int) -> None:
        """Nothing is allocated yet."""
        super().__init__(capacity, device=torch.device("cpu"))

    def register(self, key: CacheKey, shape: PageShape) -> None:
        """Make room for an attention call."""
        self.tensors(key, shape)

    def transfer_bytes(self, shape: PageShape) -> int:
        """Bytes of a page in a transfer."""
        return sum(shape.num_bytes)

    def view(self, shape: PageShape, buffer: Tensor, count: int) -> PageTensors:
        """The pages of a transfer in a buffer of bytes."""
        k, v = (count * size for size in shape.num_bytes)
        return shape.view(buffer[:k].view(count, -1), buffer[k : k + v].view(count, -1))

    def read(self, key: CacheKey, shape: PageShape, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Copy pages into a buffer; it has happened."""
        index = torch.tensor(pages)
        for source, target in zip(self._tensors[key, shape], self.view(shape, buffer, len(pages)), strict=True):
            torch.index_select(source, 0, index, out=target)
        return []

    def write(self, key: CacheKey, shape: PageShape, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Copy pages out of a buffer; it has happened."""
        index = torch.tensor(pages)
        for target, source in zip(self._tensors[key, shape], self.view(shape, buffer, len(pages)), strict=True):
            target.index_copy_(0, index, source)
        return []

    def close(self) -> None:
        """Nothing."""

"""What travels between tiers: parts of the pages of an attention call, or single rows of their V."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_helm.kv_cache.page_format import CacheKey, PageFormat, PartFormat, PartName
from flexgen_helm.kv_cache.pages import PAGE_TOKENS

WORDS = (torch.complex128, torch.int64, torch.uint8)
"""Dtypes as which pages are moved: torch's kernels take as long for a number of one byte as for one of 16 (runs/LOG.md)."""
INDEX_BYTES = 4
"""Bytes of the number that travels with each row: int32, its place in the slots."""


class Cargo(NamedTuple):
    """Parts of pages of an attention call that travel together."""

    key: CacheKey
    page_format: PageFormat
    names: tuple[PartName, ...] = ("k", "v")

    @property
    def parts(self) -> list[PartFormat]:
        """The forms of the parts."""
        return [part for name, part in zip(("k", "v"), self.page_format.parts, strict=True) if name in self.names]

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts of one page."""
        return sum(part.num_bytes for part in self.parts)

    def as_words(self, pages: Tensor) -> Tensor:
        """Stored pages ``[n, ...]`` of one part as the widest numbers of which every part has whole ones: ``[n, words]``."""
        sizes = [part.num_bytes for part in self.page_format.parts]
        word = next(dtype for dtype in WORDS if all(size % dtype.itemsize == 0 for size in sizes))
        return pages.flatten(1).view(word)

    def records(self, buffer: Tensor) -> list[Tensor]:
        """Bytes ``[pages, num_bytes]``, one page a row, as the parts."""
        split = buffer.split([part.num_bytes for part in self.parts], 1)
        return [part.view(x) for part, x in zip(self.parts, split, strict=True)]

    def stretches(self, buffer: Tensor, count: int) -> list[Tensor]:
        """Bytes of ``count`` pages, part after part, as the parts."""
        split = buffer.split([count * part.num_bytes for part in self.parts])
        return [part.view(x.view(count, -1)) for part, x in zip(self.parts, split, strict=True)]


class ValueRows(NamedTuple):
    """Rows of V of an attention call: what a head has of a token."""

    key: CacheKey
    page_format: PageFormat
    rows: Tensor
    """``[n]`` int64 on the host, increasing: (page * num_heads + head) * 32 + token, with pages counted in their store."""

    @property
    def rows_per_page(self) -> int:
        """Rows of a page."""
        return self.page_format.v.num_heads * PAGE_TOKENS

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.page_format.v.num_bytes // self.rows_per_page


def as_rows(stored: Tensor, row_bytes: int) -> Tensor:
    """Stored V ``[pages, num_heads, 32, ...]`` as its rows, uint8 ``[n, row_bytes]``, without a copy."""
    return stored.view(torch.uint8).view(-1, row_bytes)


class HeldRows:
    """Which rows of V the slots hold."""

    def __init__(self) -> None:
        """There are no slots yet."""
        self._held: dict[tuple[int, PageFormat], Tensor] = {}

    def clear(self) -> None:
        """Forget the slots."""
        self._held.clear()

    def register(self, call: int, page_format: PageFormat, num_slots: int) -> None:
        """Say that slots were made for an attention call; they count as whole."""
        if (call, page_format) not in self._held:
            shape = num_slots, page_format.v.num_heads, PAGE_TOKENS
            self._held[call, page_format] = torch.ones(shape, dtype=torch.bool)

    def set(self, slots: list[int], *, whole: bool) -> None:
        """Say that slots hold all rows of the page that they were given to, or none."""
        if slots:
            for held in self._held.values():
                held[slots] = whole

    def take_missing(self, call: int, page_format: PageFormat, slots: list[int], wanted: Tensor | None) -> Tensor:
        """Return which rows must be brought, which count as held from now on.

        Args:
            call: Number of the attention call.
            page_format: Its form.
            slots: Slots, without repetition.
            wanted: bool ``[slots, num_heads, 32]``; None: all rows.
        """
        held = self._held[call, page_format]
        here = held[slots]
        missing = ~here if wanted is None else wanted & ~here
        held[slots] = here | missing
        return missing

"""The stored form of K/V pages: their bytes, allocation, and how tokens get in and out.

Stored pages of K, and those of V, are one tensor each, whose first dimension counts pages. Whole pages can so be moved between
tensors of the same format, and through buffers of bytes, without knowing it. All else asks the format.

A *sealed* page is quantised: a page of another `PartFormat`, which is made of a full exact page at once and has no `write`;
`gather` dequantises it (`flexgen_helm.kv_cache.sealed_format`). A query attends to its own chunk in the exact form and to every
earlier chunk in the sealed form, so every chunk of a kernel call has the same form: the call's pages come with the tensors of
that form, and no kernel sees a difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from flexgen_helm.kv_cache.pages import PAGE_TOKENS
from flexgen_helm.memory.amounts import padded
from flexgen_helm.memory.buffers import zero_bytes

PartName = Literal["k", "v", "mean"]
"""A part of a page, see `PageFormat`."""


class CacheKey(NamedTuple):
    """An attention call of a model: some layers attend more than once.

    Attributes:
        layer: The layer.
        call: Number of the call in the layer, from 0.
    """

    layer: int
    call: int


class PartFormat(Protocol):
    """The stored form of one part of pages, either K or V, of one attention call."""

    @property
    def num_heads(self) -> int:
        """Number of K/V heads."""

    @property
    def dim(self) -> int:
        """Elements of a token in one head."""

    @property
    def num_rows(self) -> int:
        """Tokens of a page."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which attention reads."""

    @property
    def num_bytes(self) -> int:
        """Bytes of one stored page."""

    def allocate(self, pages: int, device: torch.device) -> Tensor:
        """Stored pages ``[pages, ...]`` that read as zeros.

        What a mask hides is multiplied by 0, which must not meet a NaN of uninitialised memory.
        """

    def view(self, buffer: Tensor) -> Tensor:
        """Bytes ``[pages, num_bytes]``, uint8, as stored pages."""

    def gather(self, stored: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Whole pages of single heads, as attention reads them.

        Args:
            stored: Stored pages.
            rows: ``[n]``: page * num_heads + head.
            out: ``[n, 32 * dim]`` to fill; None: a new tensor.

        Returns:
            ``[n, 32 * dim]`` of `dtype`: the 32 tokens of each page and head, one behind the other.
        """


class TokenPlaces(NamedTuple):
    """Where n tokens are stored.

    Attributes:
        stored: Stored pages.
        pages: ``[n]``: the page of each token.
        tokens: ``[n]``: its place in the page, below 32.
    """

    stored: Tensor
    pages: Tensor
    tokens: Tensor


def copy_tokens(source: TokenPlaces, target: TokenPlaces) -> None:
    """Copy tokens between stored pages ``[pages, num_heads, 32, ...]``."""
    found = source.stored[source.pages, :, source.tokens]
    target.stored[target.pages, :, target.tokens] = found.to(target.stored.device)


class WritablePart(PartFormat, Protocol):
    """A form into which tokens are written one by one, such as that of exact pages."""

    def write(self, stored: Tensor, pages: Tensor, tokens: Tensor, new: Tensor) -> None:
        """Store tokens.

        Args:
            stored: Stored pages.
            pages: ``[n]``: the page of each token.
            tokens: ``[n]``: its place in the page, below 32.
            new: ``[n, num_heads, dim]``, on any device.
        """

    def read(self, stored: Tensor, pages: Tensor, tokens: Tensor) -> Tensor:
        """The tokens ``[n, num_heads, dim]``, as attention reads them."""

    def copy(self, source: TokenPlaces, target: TokenPlaces) -> None:
        """Copy tokens, bit by bit, between stored pages that may be on two devices."""


class SealablePart(PartFormat, Protocol):
    """A form that whole exact pages take when they are sealed."""

    def seal(self, stored: Tensor, pages: Tensor, exact: Tensor) -> None:
        """Store whole pages.

        Args:
            stored: Stored pages.
            pages: ``[n]``, without repetition.
            exact: ``[n, num_heads, 32, dim]`` of `dtype`, finite, on any device.
        """


def bits_per_element(part: PartFormat | MeanPart) -> float:
    """Return the stored bits of a part for a number of K or V, scales and the like included."""
    return 8 * part.num_bytes / (part.num_heads * PAGE_TOKENS * part.dim)


@dataclass(frozen=True)
class PlainPart:
    """K or V stored as it is: ``[pages, num_heads, 32, dim]``, heads first, so that the tokens of a head are one stretch."""

    num_heads: int
    dim: int
    dtype: torch.dtype

    num_rows: ClassVar[int] = PAGE_TOKENS
    """Tokens of a page."""

    @property
    def num_bytes(self) -> int:
        """Bytes of one page."""
        return self.num_heads * PAGE_TOKENS * self.dim * self.dtype.itemsize

    def allocate(self, pages: int, device: torch.device) -> Tensor:
        """Zeros; on a CPU a page of memory is taken with its first use."""
        zeros = zero_bytes(pages * self.num_bytes, device)
        return zeros.view(self.dtype).view(pages, self.num_heads, PAGE_TOKENS, self.dim)

    def view(self, buffer: Tensor) -> Tensor:
        """Bytes ``[pages, num_bytes]``, uint8, as pages."""
        return unflattened(buffer.view(self.dtype), self.num_heads, PAGE_TOKENS, self.dim)

    def write(self, stored: Tensor, pages: Tensor, tokens: Tensor, new: Tensor) -> None:
        """Store tokens ``[n, num_heads, dim]``."""
        stored[pages, :, tokens] = new.to(stored.device)

    def read(self, stored: Tensor, pages: Tensor, tokens: Tensor) -> Tensor:
        """The tokens ``[n, num_heads, dim]`` at some places."""
        return stored[pages, :, tokens]

    def copy(self, source: TokenPlaces, target: TokenPlaces) -> None:
        """Copy tokens between stored pages."""
        copy_tokens(source, target)

    def seal(self, stored: Tensor, pages: Tensor, exact: Tensor) -> None:
        """Store whole pages ``[n, num_heads, 32, dim]`` as they are."""
        stored[pages] = exact.to(stored.device)

    def gather(self, stored: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy pages of single heads: ``[n, 32 * dim]``."""
        return torch.index_select(stored.view(-1, PAGE_TOKENS * self.dim), 0, rows, out=out)


@dataclass(frozen=True)
class MeanPart:
    """The mean of V over the 32 tokens of a page, as attention reads them: ``[pages, num_heads, dim]``."""

    num_heads: int
    dim: int
    dtype: torch.dtype
    num_rows: ClassVar[int] = 1
    """Rows of numbers that a page has for each head."""

    @property
    def num_bytes(self) -> int:
        """Bytes of one page."""
        return self.num_heads * self.dim * self.dtype.itemsize

    def allocate(self, pages: int, device: torch.device) -> Tensor:
        """Zeros; on a CPU a page of memory is taken with its first use."""
        zeros = zero_bytes(pages * self.num_bytes, device)
        return self.view(zeros.view(pages, self.num_bytes))

    def view(self, buffer: Tensor) -> Tensor:
        """Bytes ``[pages, num_bytes]``, uint8, as pages."""
        return unflattened(buffer.view(self.dtype), self.num_heads, self.dim)

    def store(self, stored: Tensor, pages: Tensor, values: Tensor) -> None:
        """Store the means of whole pages of V ``[n, num_heads, 32, dim]``, as attention reads them."""
        stored[pages.to(stored.device)] = values.float().mean(2).to(self.dtype).to(stored.device)

    def gather(self, stored: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy means of single heads: ``[n, dim]``; ``rows`` as in `PartFormat.gather`, and so is where the copy is."""
        flat = stored.view(-1, self.dim)
        if stored.device == rows.device:
            return torch.index_select(flat, 0, rows, out=out)
        found = flat.index_select(0, rows.to(stored.device)).to(rows.device)
        return found if out is None else out.copy_(found)


@dataclass(frozen=True)
class PageFormat:
    """The stored form of the pages of one attention call: one of K and one of V, each usable without the other.

    Attributes:
        k: The form of K.
        v: The form of V: as many heads, a head size of its own.
        mean: The form of each page's mean of V, which sparse attention reads; None: there is none. Means are stored apart
            (`flexgen_helm.kv_cache.page_means`).
    """

    k: PartFormat
    v: PartFormat
    mean: MeanPart | None = None

    @classmethod
    def plain(cls, k: Tensor, v: Tensor) -> PageFormat:
        """The format that stores tokens ``[T, num_heads, dim]`` as they are."""
        return cls(PlainPart(k.shape[1], k.shape[2], k.dtype), PlainPart(v.shape[1], v.shape[2], v.dtype))

    @property
    def parts(self) -> tuple[PartFormat, PartFormat]:
        """K and V: what is stored on the tier of a page."""
        return self.k, self.v

    @property
    def num_bytes(self) -> int:
        """Bytes of one stored page, K and V together."""
        return self.k.num_bytes + self.v.num_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of one page in a file: records are whole pages of memory, and K and V that travel apart are two."""
        records = (self.k.num_bytes, self.v.num_bytes) if self.is_apart else (self.num_bytes,)
        return sum(map(padded, records))

    @property
    def is_apart(self) -> bool:
        """Whether K and V travel apart, as sparse attention wants it."""
        return self.mean is not None

    @property
    def mean_bytes(self) -> int:
        """Bytes of a page's mean of V."""
        return 0 if self.mean is None else self.mean.num_bytes

    @property
    def bits_per_element(self) -> tuple[float, float]:
        """Stored bits of a number of K, and of one of V, means included."""
        means = 0.0 if self.mean is None else bits_per_element(self.mean)
        return bits_per_element(self.k), bits_per_element(self.v) + means

    @property
    def num_bytes_per_token(self) -> int:
        """Bytes of one stored token, K and V together."""
        return self.num_bytes // PAGE_TOKENS

    def allocate(self, pages: int, device: torch.device) -> PageTensors:
        """So many pages on a device that read as zeros."""
        return PageTensors(self, *(part.allocate(pages, device) for part in self.parts))


@dataclass(frozen=True, eq=False)
class PageTensors:
    """Pages of one attention call at one place.

    Attributes:
        format: Their form.
        k: Stored K, the first dimension counts pages.
        v: Stored V, likewise.
        mean: Means of V, if the form has any; numbered in their own way (`flexgen_helm.kv_cache.page_means`).
    """

    format: PageFormat
    k: Tensor
    v: Tensor
    mean: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Stored K and V."""
        return self.k, self.v

    def part(self, name: PartName) -> tuple[PartFormat | MeanPart, Tensor]:
        """A part, or the means, with its form."""
        form, stored = getattr(self.format, name), getattr(self, name)
        assert stored is not None, "these pages have no means"
        return form, stored

    @property
    def parts(self) -> tuple[tuple[PartFormat, Tensor], tuple[PartFormat, Tensor]]:
        """K and V, each with its form."""
        return (self.format.k, self.k), (self.format.v, self.v)

    @property
    def sealable_parts(self) -> tuple[tuple[SealablePart, Tensor], tuple[SealablePart, Tensor]]:
        """K and V, each with its form, of pages that are stored as a whole."""
        return (cast(SealablePart, self.format.k), self.k), (cast(SealablePart, self.format.v), self.v)

    @property
    def writable_parts(self) -> tuple[tuple[WritablePart, Tensor], tuple[WritablePart, Tensor]]:
        """K and V, each with its form, of pages into which tokens are written."""
        return (cast(WritablePart, self.format.k), self.k), (cast(WritablePart, self.format.v), self.v)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pages."""
        return sum(x.nbytes for x in self.tensors)


def unflattened(rows: Tensor, *shape: int) -> Tensor:
    """Rows ``[pages, n]`` as ``[pages, *shape]``, without a copy."""
    found: Tensor = rows.unflatten(1, shape)
    return found

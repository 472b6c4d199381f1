"""What the forms of K and V that are stored as codes have in common: bytes ``[pages, num_heads, ...]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flexgen_helm.kv_cache.pages import PAGE_TOKENS
from flexgen_helm.kv_cache.token_rows import TokenRow
from flexgen_helm.memory.buffers import zero_bytes


@dataclass(frozen=True)
class CodedPart:
    """K or V as codes of a few bits, uint8 ``[pages, num_heads, *head_shape]``."""

    num_heads: int
    dim: int
    dtype: torch.dtype
    bits: int
    """Bits of a code: 2, 4 or 8."""

    num_rows: ClassVar[int] = PAGE_TOKENS
    """Tokens of a page."""

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Shape of the bytes of one head of a page."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """Bytes of one page."""
        return self.num_heads * math.prod(self.head_shape)

    def allocate(self, pages: int, device: torch.device) -> Tensor:
        """Zeros; on a CPU a page of memory is taken with its first use."""
        zeros = zero_bytes(pages * self.num_bytes, device)
        return self.view(zeros.view(pages, self.num_bytes))

    def view(self, buffer: Tensor) -> Tensor:
        """Bytes ``[pages, num_bytes]``, uint8, as pages."""
        return buffer.view(len(buffer), self.num_heads, *self.head_shape)

    def target(self, rows: Tensor, out: Tensor | None) -> Tensor:
        """The tensor ``[n, 32 * dim]`` that `gather` fills: what is given, or a new one."""
        if out is not None:
            return out
        return torch.empty(len(rows), PAGE_TOKENS * self.dim, dtype=self.dtype, device=rows.device)


@dataclass(frozen=True)
class TokenRowsPart(CodedPart):
    """K or V with a `TokenRow` for each token: two numbers of 16 bits for each group, then the codes."""

    flexgen: ClassVar[bool] = False
    """Whether the numbers are FlexGen's: see `flexgen_helm.kv_cache.flexgen_format`."""

    @property
    def row(self) -> TokenRow:
        """The bytes of a token."""
        return TokenRow(self.dim, self.bits)

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Shape of the bytes of one head of a page: its tokens, and the bytes of each."""
        return PAGE_TOKENS, self.row.num_bytes

    def gather(self, stored: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Dequantise pages of single heads: ``[n, 32 * dim]``."""
        out = self.target(rows, out)
        flat = stored.view(-1, *self.head_shape)
        if stored.device.type == "cpu":
            from flexgen_helm.kv_cache.sealed_kernel import gather_tokens

            gather_tokens(flat, rows, out, self.bits, flexgen=self.flexgen)
            return out
        out.view(-1, PAGE_TOKENS, self.dim).copy_(self.decode(flat[rows]))
        return out

    def decode(self, tokens: Tensor) -> Tensor:
        """Dequantise tokens ``[..., row.num_bytes]`` by torch: float32 ``[..., dim]``."""
        raise NotImplementedError

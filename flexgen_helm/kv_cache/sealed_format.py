"""The stored form of sealed pages: keys quantised per channel over a page, values per token.

A channel of keys keeps its range over neighbouring tokens, a value does not; so the 32 numbers of a channel share a scale in K,
and up to 64 neighbouring numbers of a token do in V (KIVI, arXiv 2402.02750). Formulas, and what very large numbers become, are
in `flexgen_helm.kv_cache.minmax`. Bytes follow from the 32 exact tokens alone, whatever is sealed beside them, and wherever.

On a CPU loops compiled by Numba read and make pages (`sealed_kernel`, `seal_kernel`), elsewhere torch does, with equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_helm.kv_cache.coded_part import CodedPart, TokenRowsPart
from flexgen_helm.kv_cache.minmax import dequantize, largest, pack, quantize, unpack
from flexgen_helm.kv_cache.page_format import PageFormat
from flexgen_helm.kv_cache.pages import PAGE_TOKENS
from flexgen_helm.kv_cache.token_rows import NUMBER_BYTES

NOT_QUANTIZED = 16
"""Bits of K or V that stay as they are."""


def sealed_format(exact: PageFormat, *, k_bits: int, v_bits: int) -> PageFormat:
    """Return the form that pages take when they are sealed.

    Args:
        exact: Their form before.
        k_bits: Bits of a code of K: 2, 4, 8; or 16: K stays as it is.
        v_bits: Bits of a code of V, likewise.
    """
    k, v = exact.k, exact.v
    return PageFormat(
        k if k_bits == NOT_QUANTIZED else PerChannelPart(k.num_heads, k.dim, k.dtype, k_bits),
        v if v_bits == NOT_QUANTIZED else PerTokenPart(v.num_heads, v.dim, v.dtype, v_bits),
    )


@dataclass(frozen=True)
class PerChannelPart(CodedPart):
    """Sealed K: uint8 ``[pages, num_heads, bytes]``.

    The bytes of a head are ``[dim, 2]`` bfloat16, the scale and zero of each channel, then the codes ``[dim, 32 * bits / 8]``,
    channel after channel: token t's code is in bits ``t * bits % 8`` and up of byte ``t * bits // 8``.
    """

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of a page."""
        return self.dim * (NUMBER_BYTES + PAGE_TOKENS * self.bits // 8)

    @property
    def head_shape(self) -> tuple[int, ...]:
        """Shape of the bytes of one head of a page."""
        return (self.head_bytes,)

    def seal(self, stored: Tensor, pages: Tensor, exact: Tensor) -> None:
        """Store whole pages ``[n, num_heads, 32, dim]``, quantised where they are; their bytes go to the stored ones."""
        if exact.device.type == stored.device.type == "cpu":
            from flexgen_helm.kv_cache.seal_kernel import seal_channels

            seal_channels(stored, pages, exact, self.bits, largest(self.dtype))
            return
        stored[pages] = self.encode(exact).to(stored.device)

    def encode(self, exact: Tensor) -> Tensor:
        """Return the bytes of pages ``[n, num_heads, 32, dim]``, computed by torch: uint8 ``[n, num_heads, head_bytes]``."""
        codes, numbers = quantize(exact.transpose(-1, -2), self.bits)
        return torch.cat([numbers.view(torch.uint8).flatten(-2), pack(codes, self.bits).flatten(-2)], -1)

    def gather(self, stored: Tensor, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Dequantise pages of single heads: ``[n, 32 * dim]``."""
        out = self.target(rows, out)
        flat = stored.view(-1, self.head_bytes)
        if stored.device.type == "cpu":
            from flexgen_helm.kv_cache.sealed_kernel import gather_channels

            gather_channels(flat, rows, out, self.bits)
            return out
        out.view(-1, PAGE_TOKENS, self.dim).copy_(self.decode(flat[rows]))
        return out

    def decode(self, heads: Tensor) -> Tensor:
        """Dequantise single heads of pages, ``[n, head_bytes]``, by torch: float32 ``[n, 32, dim]``."""
        split = self.dim * NUMBER_BYTES
        numbers = heads[:, :split].contiguous().view(torch.bfloat16).view(-1, self.dim, 1, 2)
        codes = unpack(heads[:, split:].unflatten(1, (self.dim, -1)), self.bits, PAGE_TOKENS)
        return dequantize(codes, numbers).transpose(1, 2)


@dataclass(frozen=True)
class PerTokenPart(TokenRowsPart):
    """Sealed V: uint8 ``[pages, num_heads, 32, bytes]``, a `TokenRow` for each token: bfloat16 scale and zero, then codes."""

    def seal(self, stored: Tensor, pages: Tensor, exact: Tensor) -> None:
        """Store whole pages ``[n, num_heads, 32, dim]``, quantised where they are; their bytes go to the stored ones."""
        if exact.device.type == stored.device.type == "cpu":
            from flexgen_helm.kv_cache.seal_kernel import seal_tokens

            seal_tokens(stored, pages, exact, self.bits, largest(self.dtype))
            return
        stored[pages] = self.encode(exact).to(stored.device)

    def encode(self, exact: Tensor) -> Tensor:
        """Return the bytes of tokens ``[..., dim]``, computed by torch: uint8 ``[..., row.num_bytes]``."""
        return self.row.join(*quantize(self.row.groups(exact), self.bits))

    def decode(self, tokens: Tensor) -> Tensor:
        """Dequantise tokens ``[..., row.num_bytes]`` by torch: float32 ``[..., dim]``."""
        return dequantize(*self.row.split(tokens, torch.bfloat16))

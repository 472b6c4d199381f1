"""How a quantised token lies in bytes: the numbers of its groups, then its codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_helm.kv_cache.minmax import pack, unpack

GROUP = 64
"""Most neighbouring numbers of a token that share a scale."""
NUMBER_BYTES = 4
"""Bytes of a group's two numbers."""


@dataclass(frozen=True)
class TokenRow:
    """A row of bytes that can be read without its neighbours.

    It has two numbers of 16 bits for each group, then the codes, as `flexgen_helm.kv_cache.minmax.pack` packs them, and a byte
    more if their number is odd.
    """

    dim: int
    """Elements of a token in one head."""
    bits: int
    """Bits of a code."""

    @property
    def num_groups(self) -> int:
        """Groups of at most 64 elements; the last one may have fewer."""
        return -(-self.dim // GROUP)

    @property
    def codes_at(self) -> int:
        """Where the codes begin."""
        return self.num_groups * NUMBER_BYTES

    @property
    def num_bytes(self) -> int:
        """Bytes of the row, an even number."""
        return -(-(self.codes_at * 8 + self.dim * self.bits) // 16) * 2

    def groups(self, x: Tensor) -> Tensor:
        """Cut tokens ``[..., dim]`` into ``[..., groups, 64]``; the last element fills the last group up."""
        missing = self.num_groups * GROUP - self.dim
        filled = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1) if missing else x.contiguous()
        return filled.view(*x.shape[:-1], self.num_groups, GROUP)

    def join(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """Make rows.

        Args:
            codes: uint8 ``[..., groups, 64]``.
            numbers: ``[..., groups, 2]`` of 16 bits each.

        Returns:
            uint8 ``[..., num_bytes]``.
        """
        packed = pack(codes.flatten(-2)[..., : self.dim], self.bits)
        row = torch.cat([numbers.contiguous().view(torch.uint8).flatten(-2), packed], -1)
        return torch.nn.functional.pad(row, (0, self.num_bytes - row.shape[-1]))

    def split(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Read rows ``[..., num_bytes]``.

        Args:
            rows: uint8 ``[..., num_bytes]``.
            dtype: What the numbers are.

        Returns:
            Codes ``[..., dim]``, and the two numbers of each of them, ``[..., dim, 2]``.
        """
        numbers = rows[..., : self.codes_at].contiguous().view(dtype).unflatten(-1, (self.num_groups, 2))
        of_element = numbers.repeat_interleave(GROUP, -2)[..., : self.dim, :]
        return unpack(rows[..., self.codes_at :], self.bits, self.dim), of_element

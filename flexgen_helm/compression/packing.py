"""Codes of 2 to 8 bits in bytes, laid out so that rows are unpacked by one shift of whole vectors.

A matrix of codes is cut into blocks of 64 rows. The last block may be shorter; it is filled with zeros to a multiple of 8 rows.
Within a block the bits of the codes are split into planes (5 = 4 + 1, 6 = 4 + 2, 3 = 2 + 1 bits, lowest first), each of which
divides a byte. A plane of p bits of a block of n rows takes ``n * p / 8`` rows of bytes: byte row t holds, from its lowest bits
up, rows t, ``t + n * p / 8``, ``t + 2 * n * p / 8`` and so on. So codes of one row lie side by side at the same place of their
bytes, and nothing is filled up along a row, however short it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS = 64
"""Rows that are packed together."""
FILLED_ROWS = 8
"""A block has a multiple of this many rows."""
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of each plane of a code, lowest first, by the bits of a code."""


def filled(num_rows: int) -> int:
    """Return the number of rows that are stored for ``num_rows``."""
    return -(-num_rows // FILLED_ROWS) * FILLED_ROWS


def packed_rows(num_rows: int, bits: int) -> int:
    """Return the number of rows of bytes for ``num_rows`` rows of codes."""
    return filled(num_rows) * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8 ``[rows, columns]``, each below ``2**bits``.
        bits: 2, 3, 4, 5, 6 or 8.

    Returns:
        uint8 ``[packed_rows(rows, bits), columns]``.
    """
    num_rows, num_columns = codes.shape
    rows = codes.new_zeros(filled(num_rows), num_columns)
    rows[:num_rows] = codes
    blocks = len(rows) // BLOCK_ROWS
    whole = blocks * BLOCK_ROWS
    parts = (rows[:whole].view(blocks, BLOCK_ROWS, num_columns), rows[whole:].unsqueeze(0))
    return torch.cat([_pack_blocks(part, bits).flatten(0, 1) for part in parts])


def unpack(packed: Tensor, bits: int, num_rows: int) -> Tensor:
    """Return the codes ``[num_rows, columns]``, uint8, that `pack` got."""
    num_columns = packed.shape[1]
    blocks, height = filled(num_rows) // BLOCK_ROWS, packed_rows(BLOCK_ROWS, bits)
    whole = blocks * height
    parts = (packed[:whole].view(blocks, height, num_columns), packed[whole:].unsqueeze(0))
    return torch.cat([_unpack_blocks(part, bits).flatten(0, 1) for part in parts])[:num_rows]


def _pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """Pack blocks of equal height: ``[blocks, n, columns]`` to ``[blocks, n * bits / 8, columns]``."""
    blocks, n, num_columns = codes.shape
    planes, shift = [], 0
    for p in PLANES[bits]:
        fields = ((codes >> shift) & (2**p - 1)).view(blocks, 8 // p, n * p // 8, num_columns)
        planes.append(torch.stack([fields[:, i] << (i * p) for i in range(8 // p)]).sum(0, dtype=torch.uint8))
        shift += p
    return torch.cat(planes, 1)


def _unpack_blocks(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack_blocks`."""
    n = packed.shape[1] * 8 // bits
    planes = packed.split([n * p // 8 for p in PLANES[bits]], 1)
    codes, shift = packed.new_zeros(packed.shape[0], n, packed.shape[2]), 0
    for p, plane in zip(PLANES[bits], planes, strict=True):
        codes |= torch.cat([(plane >> (i * p)) & (2**p - 1) for i in range(8 // p)], 1) << shift
        shift += p
    return codes

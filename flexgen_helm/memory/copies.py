"""Copies between host and device that the host does not wait for, or waits for once.

On a GPU that needs pinned memory. It is torch's own here, which is used again only when its copies have ended. On a CPU there
is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_BYTES = 16 << 20
"""Bytes that a copy to a GPU moves at most where it is long. The copy engine takes copies of all streams as they come: a small
one, for which a row waits, lets one piece pass, 0.3 ms at 50 GB/s, and not a whole layer."""


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; work that the device does after this finds it there, and nobody waits."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def upload(values: Sequence[float] | Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return numbers as a tensor on a device, without a wait: ``torch.tensor(values, device=...)`` waits for all earlier work.

    Args:
        values: Numbers, or rows of equal lengths.
        device: Where the tensor is.
        dtype: Its dtype.
    """
    return to_device(torch.tensor(values, dtype=dtype), device)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the host, with one wait for all of them."""
    found = [x.to("cpu", non_blocking=True) for x in tensors]  # from a GPU into pinned memory
    for device in {x.device for x in tensors if x.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return found


def copy_in_pieces(target: Tensor, source: Tensor) -> None:
    """Start to copy bytes ``[n]`` in pieces, so that copies of other streams come between them."""
    for to, part in zip(target.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True):
        to.copy_(part, non_blocking=True)

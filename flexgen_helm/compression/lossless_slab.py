"""Slabs that are stored in fewer bytes and decoded to the bit: see `flexgen_helm.compression.lossless`.

The bound slab is coded as one row of 16-bit numbers, whatever its tensors are: the few of other dtypes come back too, and what
does not shrink is stored as it is. So a stored slab never takes more bytes than the bound one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flexgen_helm.compression.lossless import Planes, decode_planes, encode_planes
from flexgen_helm.machine.threads import in_threads
from flexgen_helm.memory.amounts import padded
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.slab import ALIGNMENT, SlabLayout, SlabTensor

FORMAT_VERSION = 1
"""Raised whenever the bytes of a stored slab may change."""
PLANES, SIZES, PLAIN = "planes", "sizes", "plain"
"""Names of the stored tensors: planes and the sizes of their frames, or the bound slab as it is."""
SHARES = 4
"""Parts of the frames for each thread, so that none waits long for another."""


@dataclass(frozen=True)
class LosslessSlab:
    """Format of a unit whose stored slab is coded without loss. What a link carries is the bound slab.

    Attributes:
        stored: Layout of the stored slab, which follows from its content.
        bound: Layout of the bound slab.
        dtype: bf16 or fp16: how the numbers were coded.
    """

    stored: SlabLayout
    bound: SlabLayout
    dtype: torch.dtype

    @property
    def carried(self) -> SlabLayout:
        """Layout of the carried slab, equal to the bound one."""
        return self.bound

    @property
    def is_coded(self) -> bool:
        """Yes."""
        return True

    @property
    def is_packed(self) -> bool:
        """No."""
        return False

    def decode(self, stored: Tensor, carried: Tensor) -> None:
        """Fill a slab from a coded one.

        Raises:
            CorruptFile: If a frame is damaged.
        """
        parts = {place.names[0]: place.view(stored) for place in self.stored.tensors}
        target = carried[: self.bound.num_bytes]
        if PLAIN in parts:
            target.copy_(parts[PLAIN])
            return
        sizes = tuple(parts[SIZES].tolist())
        planes = Planes(self.dtype, self.bound.num_bytes // 2, sizes, parts[PLANES])
        num_parts = min(len(sizes), SHARES * torch.get_num_threads())
        frames = [range(len(sizes) * i // num_parts, len(sizes) * (i + 1) // num_parts) for i in range(num_parts)]
        in_threads(partial(decode_planes, planes, target=target), frames)

    def unpack(self, carried: Tensor, bound: Tensor) -> None:
        """Refuse: the carried slab is the bound one."""
        raise AssertionError("slabs that are coded without loss are not packed")

    def load(self, stored: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a coded one."""
        self.decode(stored, bound)


def encode_slab(memory: Tensor, bound: SlabLayout, dtype: torch.dtype) -> tuple[Tensor, LosslessSlab]:
    """Code a slab.

    Args:
        memory: uint8: the bound slab, at a page boundary.
        bound: Its layout.
        dtype: Dtype of most of its numbers, bf16 or fp16.

    Returns:
        The stored slab at a page boundary, and its format. It is ``memory`` where coding makes it no smaller.
    """
    memory = memory[: bound.num_bytes]
    room = allocate(bound.num_bytes)
    planes = encode_planes(memory, dtype, room)
    if planes is not None:
        taken = planes.memory.numel()
        sizes = SlabTensor((SIZES,), torch.int32, (len(planes.sizes),), -(-taken // ALIGNMENT) * ALIGNMENT)
        num_bytes = padded(sizes.offset + sizes.num_bytes)
        if num_bytes < bound.num_bytes:
            sizes.view(room).copy_(torch.tensor(planes.sizes, dtype=torch.int32))
            layout = SlabLayout((SlabTensor((PLANES,), torch.uint8, (taken,), 0), sizes), num_bytes)
            return room, LosslessSlab(layout, bound, dtype)
    layout = SlabLayout((SlabTensor((PLAIN,), torch.uint8, (bound.num_bytes,), 0),), bound.num_bytes)
    return memory, LosslessSlab(layout, bound, dtype)

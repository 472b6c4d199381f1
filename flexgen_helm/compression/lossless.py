"""16-bit weights in fewer bytes, equal to the bit: exponents entropy-coded, the rest as it is.

Exponents of trained weights have some 2.7 bits of entropy, so bf16 takes 10.7 of its 16 bits. Those of fp16 share a byte with
the sign and two bits of mantissa: 13.6 bits of 16, which pays only where the disk binds and cores idle. Other dtypes are not
coded. All bits come back, of NaN and negative zero too.

A frame of zstd holds the coded plane of some numbers, so that several threads decode at once, each into memory that stays in
its core's cache. zstd's checksum covers the coded plane; the other plane is as safe as any weights in their slab, whose
checksum covers both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import zstandard
from torch import Tensor

from flexgen_helm.compression.coding import code_compressor, decompress
from flexgen_helm.compression.lossless_kernel import join_bytes, join_exponents
from flexgen_helm.errors import CorruptFile, UnsupportedModel

FRAME_NUMBERS = 2**18
"""Numbers of a frame."""
CODED_BITS = {torch.bfloat16: 10.7, torch.float16: 13.6}
"""Bits of a trained weight of each dtype, about."""
JOINS = {torch.bfloat16: join_exponents, torch.float16: join_bytes}
"""How planes of each dtype are joined."""


@dataclass(frozen=True)
class Planes:
    """Numbers of 16 bits as two byte planes."""

    dtype: torch.dtype
    """bf16 or fp16."""
    count: int
    """How many numbers."""
    sizes: tuple[int, ...]
    """Bytes of the frames."""
    memory: Tensor
    """uint8, contiguous: the plane that is not coded, ``count`` bytes, then the frames."""

    def numbers(self, frame: int) -> slice:
        """Return which numbers a frame holds."""
        return slice(frame * FRAME_NUMBERS, min((frame + 1) * FRAME_NUMBERS, self.count))


def encode_planes(memory: Tensor, dtype: torch.dtype, room: Tensor) -> Planes | None:
    """Code numbers, a frame at a time.

    Args:
        memory: uint8 ``[2 * count]``, contiguous, on the CPU: the numbers.
        dtype: What they are.
        room: uint8, contiguous, on the CPU: where the planes go.

    Returns:
        The coded numbers, whose memory is the beginning of the room; None if they do not fit there.

    Raises:
        UnsupportedModel: If they have no 16 bits.
    """
    if dtype not in JOINS:
        raise UnsupportedModel(
            f"Weights in {dtype} cannot be coded without loss, only those in bfloat16 and float16. "
            "Load the model in one of these."
        )
    halves, target = memory.numpy().view(np.uint16), room.numpy()
    sizes, end, compressor = [], len(halves), code_compressor()
    for begin in range(0, len(halves), FRAME_NUMBERS):
        numbers = halves[begin : begin + FRAME_NUMBERS]
        if dtype == torch.bfloat16:
            coded, rest = numbers >> 7, (numbers & 0x7F) | ((numbers >> 8) & 0x80)
        else:
            coded, rest = numbers >> 8, numbers & 0xFF
        frame = compressor.compress(coded.astype(np.uint8).data)
        if end + len(frame) > len(target):
            return None
        target[begin : begin + len(numbers)] = rest
        target[end : end + len(frame)] = np.frombuffer(frame, np.uint8)
        end += len(frame)
        sizes.append(len(frame))
    return Planes(dtype, len(halves), tuple(sizes), room[:end])


def decode_planes(planes: Planes, frames: range, target: Tensor) -> None:
    """Bring numbers of some frames back; threads take frames of their own.

    Args:
        planes: The coded numbers.
        frames: Which frames; ``range(len(planes.sizes))`` for all.
        target: uint8 ``[2 * count]``, contiguous, on the CPU, at an even address. Only the frames' numbers are written.

    Raises:
        CorruptFile: If a frame is damaged, or memory is missing.
    """
    if planes.memory.numel() != planes.count + sum(planes.sizes):
        raise CorruptFile(
            f"Compressed weights have {planes.memory.numel()} bytes instead of {planes.count + sum(planes.sizes)}: "
            "they are torn. Compress the model again."
        )
    memory, halves, join = planes.memory.numpy(), target.numpy().view(np.uint16), JOINS[planes.dtype]
    decompressor = zstandard.ZstdDecompressor()
    begin = planes.count + sum(planes.sizes[: frames.start])
    for frame in frames:
        numbers, end = planes.numbers(frame), begin + planes.sizes[frame]
        content = decompress(decompressor, memory[begin:end].data, numbers.stop - numbers.start)
        join(np.frombuffer(content, np.uint8), memory[numbers], halves[numbers])
        begin = end

"""Integers of the entropy-coded quantizer as bytes: zstd frames that several threads decode independently of each other.

A matrix is cut into blocks of rows. Within a block, columns of the same class lie together, as a frame: they have one
distribution, so that zstd's Huffman code, one for 128 KiB, comes near the entropy. A block is decoded into memory that stays
in a core's cache, and unpacked from there into its rows of weights. python-zstandard and the kernel release the GIL.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import zstandard
from torch import Tensor

from flexgen_helm.compression.entropy import Coded, row_factors
from flexgen_helm.compression.entropy_kernel import BFLOAT16, FLOAT16, FP32, order_columns, unpack_columns
from flexgen_helm.errors import CorruptFile

WINDOW_LOG = 17
"""Of zstd: the smallest that allows blocks of 128 KiB, its largest."""
BLOCK_WEIGHTS = 2**20
"""Weights of a block, or those of one row if there are more."""
FRAME_WEIGHTS = 2**15
"""Classes are joined with the next one until a frame has as many: a frame costs some 100 bytes of headers and code tables."""
KINDS = {torch.float32: FP32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_NO_WORDS, _NO_HALVES = np.empty(0, np.uint32), np.empty(0, np.uint16)


def code_compressor() -> zstandard.ZstdCompressor:
    """Return a compressor of zstd's level 1 that finds next to no repetitions, with checksums.

    Weights repeat by chance only, and where zstd takes such a repetition it costs more bits and more time than the Huffman
    code of the numbers: exponents of bf16 weights take 2.66 bits instead of 3.05, and are decoded 1.3 times as fast.
    """
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, min_match=7, hash_log=6, window_log=WINDOW_LOG, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


@dataclass(frozen=True)
class Layout:
    """Where the integers of a matrix are in its blocks; follows from its shape and classes."""

    num_rows: int
    block_rows: int
    """Rows of a block; the last one may have fewer."""
    order: np.ndarray
    """int32 ``[in]``: which column of the matrix each stored column is."""
    widths: np.ndarray
    """int64 ``[groups]``: columns of each frame of a block."""

    @property
    def num_blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.num_rows // self.block_rows)

    def rows(self, block: int) -> slice:
        """Return the rows of a block."""
        return slice(block * self.block_rows, min((block + 1) * self.block_rows, self.num_rows))


@dataclass(frozen=True)
class Stored:
    """A quantised matrix with its integers in frames."""

    layout: Layout
    classes: Tensor
    """uint8 ``[in]``."""
    steps: Tensor
    """fp16 ``[in]``."""
    places: Tensor
    """int64 ``[n]``, rising: flat indices of integers beyond int8."""
    values: Tensor
    """int32 ``[n]``: those integers."""
    sizes: tuple[int, ...]
    """Bytes of the frames, block by block."""
    data: Tensor
    """uint8: the frames one behind the other."""
    row_classes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    """uint8 ``[out]``, or empty: see `Coded`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that must be kept."""
        columns, exceptions = len(self.steps) * (2 + 1), len(self.places) * (8 + 4)
        return self.data.numel() + len(self.sizes) * 4 + columns + exceptions + len(self.row_classes)


def layout_of(num_rows: int, classes: Tensor) -> Layout:
    """Return where the integers of a matrix ``[num_rows, in]`` with these classes of columns, uint8 ``[in]``, are stored."""
    block_rows = min(num_rows, max(1, BLOCK_WEIGHTS // len(classes)))
    widths, width = [], 0
    for of_class in torch.bincount(classes.long()).tolist():
        width += of_class
        if width * block_rows >= FRAME_WEIGHTS:
            widths.append(width)
            width = 0
    if width and widths:
        widths[-1] += width
    elif width:
        widths = [width]
    order = classes.argsort(stable=True).int().numpy()
    return Layout(num_rows, block_rows, order, np.array(widths, np.int64))


def encode(coded: Coded, compressor: zstandard.ZstdCompressor | None = None) -> Stored:
    """Store a quantised matrix in frames with checksums.

    Args:
        coded: The matrix.
        compressor: zstd's settings, to compare them.
    """
    compressor = compressor or code_compressor()
    layout = layout_of(len(coded.integers), coded.classes)
    integers, frames = coded.integers.numpy(), []
    groups = np.split(layout.order, np.cumsum(layout.widths)[:-1])
    for block in range(layout.num_blocks):
        rows = integers[layout.rows(block)]
        frames += [compressor.compress(np.ascontiguousarray(rows[:, group]).data) for group in groups]
    data = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8)
    sizes = tuple(len(frame) for frame in frames)
    return Stored(layout, coded.classes, coded.steps, coded.places, coded.values, sizes, data, coded.row_classes)


def decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, num_bytes: int) -> bytes:
    """Return the content of a zstd frame.

    Args:
        decompressor: Of this thread.
        frame: The frame and nothing else.
        num_bytes: What the content must have.

    Raises:
        CorruptFile: If the frame is torn, its checksum is wrong, or its content has another length.
    """
    try:
        # Asked before memory is taken, because a torn header may name any length.
        if (found := zstandard.frame_content_size(frame)) == num_bytes:
            content: bytes = decompressor.decompress(frame)
            return content
        reason = f"holds {found} numbers instead of {num_bytes}"
    except zstandard.ZstdError as error:
        reason = f"cannot be decompressed ({error})"
    raise CorruptFile(f"A frame of compressed weights {reason}: it is damaged. Compress the model again.")


class Decoder:
    """Decodes blocks in one thread; another thread needs another decoder."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor()
        self._scratch = np.empty(0, np.int8)

    def block(self, stored: Stored, block: int) -> np.ndarray:
        """Return a block's integers, int8 ``[rows * in]``, in the order of `unpack_columns`; the next call overwrites them.

        Raises:
            CorruptFile: If a frame is damaged.
        """
        layout = stored.layout
        rows, num_frames = layout.rows(block), len(layout.widths)
        num_rows, first = rows.stop - rows.start, block * num_frames
        if len(self._scratch) < num_rows * len(layout.order):
            self._scratch = np.empty(num_rows * len(layout.order), np.int8)
        data = stored.data.numpy().data
        begin, at = sum(stored.sizes[:first]), 0
        for size, width in zip(stored.sizes[first : first + num_frames], layout.widths, strict=True):
            end = at + int(width) * num_rows
            content = decompress(self._decompressor, data[begin : begin + size], end - at)
            self._scratch[at:end] = np.frombuffer(content, np.int8)
            begin, at = begin + size, end
        return self._scratch[:at]

    def unpack(self, stored: Stored, block: int, target: Tensor) -> None:
        """Write the rows of a block into a matrix of weights.

        Args:
            stored: The matrix.
            block: Which rows.
            target: fp32, bf16 or fp16 ``[out, in]``, contiguous, on the CPU. The rows become
                ``dequantize(...).to(target.dtype)``, to the bit.

        Raises:
            CorruptFile: If a frame is damaged.
        """
        rows, columns = stored.layout.rows(block), len(stored.steps)
        words, halves, memory = _NO_WORDS, _NO_HALVES, target[rows].view(-1)
        if target.dtype == torch.float32:
            words = memory.view(torch.int32).numpy().view(np.uint32)
        else:
            halves = memory.view(torch.int16).numpy().view(np.uint16)
        places = stored.places.numpy()
        ends = np.searchsorted(places, [rows.start * columns, rows.stop * columns])
        unpack_columns(
            self.block(stored, block),
            stored.layout.widths,
            stored.layout.order,
            stored.steps.float().numpy(),
            row_factors(stored.row_classes[rows]).numpy(),
            places[slice(*ends)] - rows.start * columns,
            stored.values.numpy()[slice(*ends)],
            KINDS[target.dtype],
            words,
            halves,
        )


def decode_into(stored: Stored, integers: Tensor) -> None:
    """Decode the integers of a matrix.

    Args:
        stored: The matrix.
        integers: int8 ``[out, in]``, contiguous, on the CPU, filled; those beyond int8 are at the nearest end.

    Raises:
        CorruptFile: If a frame is damaged.
    """
    layout, decoder = stored.layout, Decoder()
    for block in range(layout.num_blocks):
        rows = integers[layout.rows(block)].view(-1).numpy()
        order_columns(decoder.block(stored, block), layout.widths, layout.order, rows)


def decode(stored: Stored) -> Coded:
    """Return the quantised matrix that was stored.

    Raises:
        CorruptFile: If a frame is damaged.
    """
    integers = torch.empty(stored.layout.num_rows, len(stored.layout.order), dtype=torch.int8)
    decode_into(stored, integers)
    return Coded(integers, stored.steps, stored.classes, stored.places, stored.values, stored.row_classes)

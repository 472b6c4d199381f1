"""Scattered reads past the page cache: of a file, only the aligned blocks that hold what is wanted."""

from __future__ import annotations

from concurrent.futures import wait

import torch
from torch import Tensor

from flexgen_helm.memory.amounts import PAGE
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.direct_io import DirectFile, DiskIO


class BlockReader:
    """Reads stretches of bytes, all of one length, through a buffer of blocks."""

    def __init__(self, file: DirectFile, io: DiskIO, *, num_bytes: int) -> None:
        """Allocate nothing yet.

        Args:
            file: File to read.
            io: Threads that read.
            num_bytes: Size of the buffer.
        """
        self._file, self._io, self._num_bytes = file, io, num_bytes
        self._buffer: Tensor | None = None

    def read(self, begins: Tensor, out: Tensor) -> int:
        """Read stretches and wait for them.

        Args:
            begins: ``[n]`` int64, increasing: where each begins in the file.
            out: uint8 ``[n, length]`` to fill.

        Returns:
            Bytes that were read.

        Raises:
            FlexGenError: See `DirectFile.read`.
        """
        length = out.shape[1]
        first, last = begins // PAGE, (begins + length - 1) // PAGE
        most = int((last - first).max()) + 1
        blocks = torch.cat([torch.minimum(first + i, last) for i in range(most)]).unique()
        begin_at, end_at = torch.searchsorted(blocks, first), torch.searchsorted(blocks, last) + 1
        capacity = max(self._num_bytes // PAGE, most)
        if self._buffer is None or len(self._buffer) < capacity * PAGE:
            self._buffer = allocate(capacity * PAGE)
        num_bytes, done = 0, 0
        while done < len(begins):
            base = int(begin_at[done])
            stop = int(torch.searchsorted(end_at, base + capacity, right=True))
            part = slice(done, stop)
            num_bytes += self._fill(blocks[base : int(end_at[stop - 1])], self._buffer)
            offsets = begins[part] - (first[part] - begin_at[part] + base) * PAGE
            windows = self._buffer.as_strided((len(self._buffer) - length + 1, length), (1, 1))
            torch.index_select(windows, 0, offsets, out=out[part])
            done = stop
        return num_bytes

    def _fill(self, blocks: Tensor, buffer: Tensor) -> int:
        """Read blocks side by side, neighbours at once."""
        breaks = ((blocks[1:] - blocks[:-1]) != 1).nonzero()[:, 0] + 1
        cuts = [0, *breaks.tolist(), len(blocks)]
        starts = blocks[torch.tensor(cuts[:-1])].tolist()
        futures = [
            self._io.read(self._file, start * PAGE, buffer[begin * PAGE : end * PAGE])
            for start, begin, end in zip(starts, cuts, cuts[1:], strict=False)
        ]
        wait(futures)
        for future in futures:
            future.result()
        return len(blocks) * PAGE

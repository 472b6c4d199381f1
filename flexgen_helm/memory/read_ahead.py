"""Read-ahead: slabs on disk are read into buffers before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity


class SlabSource(Protocol):
    """A source from which slabs are read, such as a folder on disk."""

    def read(self, j: int, into: Tensor) -> Future[None]:
        """Start to read slab j into the first bytes of a buffer (uint8); the future raises the error of the read."""

    def close(self) -> None:
        """Stop reading; a second call does nothing."""


@dataclass(eq=False)
class _Buffer:
    memory: Tensor
    j: int = -1
    reading: Future[None] | None = None
    taken: bool = False

    @property
    def failed(self) -> bool:
        return self.reading is not None and self.reading.done() and self.reading.exception() is not None


class ReadAhead:
    """A few host buffers that hold the slabs needed next; layers come in a fixed cycle, so the next ones are known."""

    def __init__(self, source: SlabSource, sizes: Mapping[int, int], *, num_buffers: int, pin: bool, meter: Meter) -> None:
        """Allocate the buffers.

        Args:
            source: Source from which the slabs are read.
            sizes: Bytes of each slab on disk by its number, in the order of their use.
            num_buffers: Slabs in memory at a time.
            pin: Whether to pin the buffers, so that a GPU can copy from them.
            meter: Measures the reads.
        """
        self._source, self._slabs, self._sizes, self._meter = source, list(sizes), dict(sizes), meter
        self._buffers = [_Buffer(allocate(max(sizes.values()), pin=pin)) for _ in range(num_buffers)]
        meter.hold("host", "read ahead", num_buffers * max(sizes.values()))

    def start(self, j: int) -> None:
        """Start to read slab j into a free buffer, unless a buffer has it; keep that buffer for slab j until `free`."""
        buffer = self._holder(j)
        if buffer is not None and not buffer.taken and buffer.failed:
            buffer.j = -1  # the disk may answer now
            buffer = None
        if buffer is None:
            # Among the free buffers, take the one whose slab is needed last.
            buffer = max((buffer for buffer in self._buffers if not buffer.taken), key=lambda buffer: self._turns(j, buffer.j))
            if buffer.reading is not None:
                buffer.reading.exception()  # a read that nobody waited for must not write into the buffer any more
            buffer.j, buffer.reading = j, self._read(j, buffer.memory)
        buffer.taken = True

    def start_from(self, j: int) -> None:
        """Start to read slab j and the slabs after it, one for each buffer."""
        place = self._slabs.index(j)
        for i in range(len(self._buffers)):
            self.start(self._slabs[(place + i) % len(self._slabs)])

    def start_behind(self, j: int) -> None:
        """Start to read the slabs after j, one for each buffer; the buffer of slab j must be free."""
        self.start_from(self._slabs[(self._slabs.index(j) + 1) % len(self._slabs)])

    def take(self, j: int) -> Tensor:
        """Wait for slab j and return its buffer.

        Raises:
            CorruptFile: If the slab cannot be read or is torn.
        """
        self.start(j)
        buffer = self._holder(j)
        assert buffer is not None
        assert buffer.reading is not None
        try:
            buffer.reading.result()
        except BaseException:
            buffer.j, buffer.taken, buffer.reading = -1, False, None
            raise
        return buffer.memory

    def free(self, j: int) -> None:
        """Free the buffer of slab j for another slab."""
        buffer = self._holder(j)
        if buffer is not None:
            buffer.taken = False

    def free_all(self) -> None:
        """Free all buffers for other slabs."""
        for buffer in self._buffers:
            buffer.taken = False

    def forget_all(self) -> None:
        """Free all buffers and forget their content, so that every slab is read again."""
        for buffer in self._buffers:
            buffer.j, buffer.taken = -1, False

    def _read(self, j: int, into: Tensor) -> Future[None]:
        meter, begin, size = self._meter, self._meter.now(), self._sizes[j]
        reading = self._source.read(j, into)
        reading.add_done_callback(lambda _: meter.add("disk_read", Activity("load_weights", str(j)), begin, meter.now(), size))
        return reading

    def _holder(self, j: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.j == j), None)

    def _turns(self, j: int, other: int) -> int:
        """Return how many slabs after j the other one is needed; an empty buffer (-1) counts as needed last."""
        if other < 0:
            return len(self._slabs)
        return (self._slabs.index(other) - self._slabs.index(j)) % len(self._slabs)

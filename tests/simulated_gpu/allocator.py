"""As much of torch's caching allocator as decides how much memory a process reserves.

Source: c10/cuda/CUDACachingAllocator.cpp. Freed memory stays reserved. A block is cut from the smallest free one of its stream
that is large enough, and grows together with free neighbours. What ``record_stream`` delays is free at once here.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import torch

ROUND = 512
SMALL = 1 << 20
"""Up to this size blocks come from segments of 2 MiB, and only of larger ones a remainder this small is not cut off."""
SMALL_SEGMENT, LARGE_SEGMENT, LARGE = 2 << 20, 20 << 20, 10 << 20
GIB = 2**30


@dataclass(eq=False)
class Segment:
    """What one cudaMalloc returned, for the small or large blocks of one stream."""

    size: int
    pool: tuple[object, bool]
    free: list[tuple[int, int]] = field(default_factory=list)
    """Ranges (begin, end), sorted and apart."""


@dataclass(frozen=True, eq=False)
class Block:
    """Memory in use."""

    segment: Segment
    begin: int
    size: int


class CachingAllocator:
    """The memory of one device; all sizes in bytes."""

    def __init__(self, total: int) -> None:
        self.total = self.allowed = total
        """Bytes of the device, and those of them that this process may take."""
        self.allocated = self.most_allocated = 0
        self.reserved = self.most_reserved = 0
        self._segments: list[Segment] = []

    def allocate(self, num_bytes: int, stream: object) -> Block:
        """Take memory for a stream.

        Raises:
            torch.OutOfMemoryError: If it does not fit, also after the cache was emptied.
        """
        size = -(-num_bytes // ROUND) * ROUND
        segment, begin, end = self._best(size, (stream, size <= SMALL)) or self._segment(size, (stream, size <= SMALL))
        segment.free.remove((begin, end))
        if end - begin - size >= (ROUND if size <= SMALL else SMALL + 1):
            bisect.insort(segment.free, (begin + size, end))
        else:
            size = end - begin
        self.allocated += size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return Block(segment, begin, size)

    def free(self, block: Block) -> None:
        """Put memory back into the cache."""
        begin, end = block.begin, block.begin + block.size
        for hole in [hole for hole in block.segment.free if hole[0] == end or hole[1] == begin]:
            block.segment.free.remove(hole)
            begin, end = min(begin, hole[0]), max(end, hole[1])
        bisect.insort(block.segment.free, (begin, end))
        self.allocated -= block.size

    def empty_cache(self) -> None:
        """Give back the segments of which nothing is in use."""
        self._segments = [segment for segment in self._segments if segment.free != [(0, segment.size)]]
        self.reserved = sum(segment.size for segment in self._segments)

    def reset_peaks(self) -> None:
        """Let the largest amounts be those of now."""
        self.most_allocated, self.most_reserved = self.allocated, self.reserved

    def _best(self, size: int, pool: tuple[object, bool]) -> tuple[Segment, int, int] | None:
        fitting = [
            (end - begin, i, begin, end)
            for i, segment in enumerate(self._segments)
            if segment.pool == pool
            for begin, end in segment.free
            if end - begin >= size
        ]
        if not fitting:
            return None
        _, i, begin, end = min(fitting)
        return self._segments[i], begin, end

    def _segment(self, size: int, pool: tuple[object, bool]) -> tuple[Segment, int, int]:
        wanted = LARGE_SEGMENT if size < LARGE else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        if size <= SMALL:
            wanted = SMALL_SEGMENT
        if self.reserved + wanted > self.allowed:
            self.empty_cache()
        if self.reserved + wanted > self.allowed:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory (simulated). Tried to allocate {size / GIB:.2f} GiB; {self.allowed / GIB:.2f} GiB "
                f"are allowed, {self.reserved / GIB:.2f} reserved, {self.allocated / GIB:.2f} in use."
            )
        segment = Segment(wanted, pool, [(0, wanted)])
        self._segments.append(segment)
        self.reserved += wanted
        self.most_reserved = max(self.most_reserved, self.reserved)
        return segment, 0, wanted

"""Whether slabs on disk are worth coding without loss. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_GAIN = 0.1
"""Share of a sweep that coding must save: rates of disks and of shared cores vary within minutes by as much."""


@dataclass(frozen=True)
class SlabCosts:
    """What one sweep over the slabs on disk costs."""

    plain_bytes: int
    """Bytes that are read if they are not coded."""
    coded_bytes: float
    """Bytes that are read if they are."""
    disk_rate: float
    """Bytes per second that the disk reads."""
    num_weights: float
    """Weights that are decoded."""
    decoding_rate: float
    """Weights per second that all cores together decode."""
    computing_seconds: float
    """Seconds in which the same cores compute; 0 where another device computes."""

    @property
    def plain_seconds(self) -> float:
        """Least seconds of a sweep if slabs are not coded."""
        return max(self.plain_bytes / self.disk_rate, self.computing_seconds)

    @property
    def coded_seconds(self) -> float:
        """Least seconds of a sweep if slabs are coded."""
        return max(self.coded_bytes / self.disk_rate, self.computing_seconds + self.num_weights / self.decoding_rate)


def is_worth_coding(costs: SlabCosts) -> bool:
    """Return whether coded slabs make a sweep shorter by at least `LEAST_GAIN`.

    The disk, the cores and a GPU work side by side, so that a sweep takes as long as the slowest of them; each core does one
    thing at a time, so that its seconds add up. Without coding, the disk reads P bytes at d bytes/s while the cores compute
    for C seconds: ``max(P / d, C)``. With it, the disk reads p bytes while the cores also decode W weights at r weights/s:
    ``max(p / d, C + W / r)``. So coding helps only where ``C + W / r < P / d``: as far as the cores wait for the disk.

    Beside a GPU, C is 0. The time G in which it computes is left out: since G bounds a sweep from below both with and without
    coding, coding that makes it shorter for G = 0 makes it longer for no G.
    """
    return costs.coded_seconds <= (1 - LEAST_GAIN) * costs.plain_seconds

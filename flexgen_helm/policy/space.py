"""Space: the bytes of each tier that an engine may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexgen_helm.types import TIERS, Tier


@dataclass(frozen=True)
class Space:
    """Bytes of each tier that an engine may use."""

    available: Mapping[Tier, int]
    own_memory: bool
    """Whether the device has a memory of its own; if not, device and host are one RAM and `available` has it for both."""
    limits: Mapping[Tier, int] = field(default_factory=dict)
    """Most bytes that the user allows, for the tiers that the user names."""
    is_gpu: bool = False
    """Whether the device is a GPU, on which attention rounds in another way than on the CPU."""
    scratch_bytes: int = 0
    """Bytes of the device that attention takes for a moment, whatever the row sizes."""
    folder: str = ""
    """Where the bytes of the disk are, for messages; empty if that is not known."""

    def limited(self, tier: Tier) -> bool:
        """Return whether the user limits a tier, and not the free memory."""
        named = [tier] if self.own_memory or tier == "disk" else [tier for tier in TIERS[:2] if tier in self.limits]
        return any(t in self.limits for t in named) and sum(self.limits[t] for t in named) <= self.available[tier]

    def of(self, tier: Tier) -> int:
        """Return the bytes of a tier that may be used."""
        return self.available[tier]


def pool_name(tier: Tier, *, own_memory: bool) -> str:
    """Return the name of a tier's space for messages; without device memory of its own, device and host are one."""
    if tier == "disk":
        return "disk space"
    return f"{tier} memory" if own_memory else "memory"

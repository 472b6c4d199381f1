"""How much of each tier may be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexgen_helm.types import TIERS, Tier


@dataclass(frozen=True)
class Space:
    """Bytes that may be used of each tier."""

    available: Mapping[Tier, int]
    own_memory: bool
    """Whether the device has a memory of its own; else device and host are the same RAM, and `available` says it for both."""
    limits: Mapping[Tier, int] = field(default_factory=dict)
    """What the user allows, of the tiers that are named."""

    def limited(self, tier: Tier) -> bool:
        """Whether it is the user who limits a tier, and not what is free."""
        named = [tier] if self.own_memory or tier == "disk" else [tier for tier in TIERS[:2] if tier in self.limits]
        return any(t in self.limits for t in named) and sum(self.limits[t] for t in named) <= self.available[tier]

    def of(self, tier: Tier) -> int:
        """Bytes of a tier."""
        return self.available[tier]


def pool_name(tier: Tier, *, own_memory: bool) -> str:
    """Name a tier's space for messages: on a CPU, device and host are one memory."""
    if tier == "disk":
        return "disk space"
    return f"{tier} memory" if own_memory else "memory"

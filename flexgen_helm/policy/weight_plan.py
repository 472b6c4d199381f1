"""Where the parts of a model are, and what of each tier that takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.slab import SlabLayout
from flexgen_helm.types import TIERS, Shares, Tier

LOADED_AT_ONCE = 2
"""Times the largest part: as it is read, and as it is kept."""
EMBEDDINGS = -1
"""Number of the embedding tables among the parts of a model; its layers have 0 to L - 1 and the output head L."""


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


@dataclass(frozen=True)
class WeightPlan:
    """Where each part of a model rests."""

    layouts: Mapping[int, SlabLayout]
    """Of the layers, and of the output head where it has weights of its own."""
    tiers: Mapping[int, Tier]
    """Of every part."""
    sizes: Mapping[int, int]
    """Bytes of every part."""
    num_layers: int
    own_memory: bool
    prefetch: int
    working_bytes: int
    """That computing takes on the device."""
    checking_bytes: int
    """That the self-check takes beside the layers that it checks."""
    first_layers_bytes: int
    """Of the layers that are checked before anything else is loaded, where not all stay on the device."""
    cache_room: Mapping[Tier, int]
    """Of each tier for K and V of one sequence, the least cache with which jobs are answered."""

    @property
    def streamed(self) -> list[int]:
        """Layers, and the output head, that are loaded whenever their turn comes."""
        resting = TIERS[1:] if self.own_memory else TIERS[2:]
        return [j for j in self.layouts if self.tiers[j] in resting]

    @property
    def is_resident(self) -> bool:
        """Whether all weights stay where they are used."""
        return not self.streamed and (not self.own_memory or self.tiers[EMBEDDINGS] == "device")

    @property
    def on_disk(self) -> list[int]:
        """Parts that rest in slab files."""
        return [j for j in self.layouts if self.tiers[j] == "disk"]

    @property
    def num_slots(self) -> int:
        """Streamed parts on the device at a time."""
        return min(self.prefetch + 1, len(self.streamed))

    @property
    def weight_bytes(self) -> dict[Tier, int]:
        """Bytes of weights that rest on each tier."""
        return {tier: sum(self.sizes[j] for j in self.sizes if self.tiers[j] == tier) for tier in TIERS}

    @property
    def resident_bytes(self) -> dict[Tier, int]:
        """Bytes of weights on each tier that are used where they are."""
        streamed = set(self.streamed)
        return {t: sum(self.sizes[j] for j in self.sizes if self.tiers[j] == t and j not in streamed) for t in TIERS[:2]}

    @property
    def bytes_per_sweep(self) -> dict[str, int]:
        """Bytes that a sweep in column order brings to the device, ``from_host`` and ``from_disk``."""
        return {f"from_{tier}": sum(self.sizes[j] for j in self.streamed if self.tiers[j] == tier) for tier in TIERS[1:]}

    @property
    def shares(self) -> Shares:
        """The realised shares."""
        total, found = max(1, sum(self.sizes.values())), self.weight_bytes
        return found["device"] / total, found["host"] / total, found["disk"] / total

    @property
    def needed_bytes(self) -> dict[Tier, int]:
        """Bytes of each tier that weights take, slots and read-ahead buffers included."""
        needed = self.weight_bytes
        largest = max((self.layouts[j].num_bytes for j in self.streamed), default=0)
        buffers = min(self.num_slots, len(self.on_disk)) * max((self.layouts[j].num_bytes for j in self.on_disk), default=0)
        needed["device"] += self.num_slots * largest if self.own_memory else 0
        needed["host"] += buffers
        return needed

    @property
    def peak_bytes(self) -> dict[Tier, int]:
        """Bytes of each tier that are needed at some time, with the smallest cache; device and host as one if they are."""
        peak, resting = dict(self.needed_bytes), self.weight_bytes
        peak["device"] += self.working_bytes
        for tier, count in self.cache_room.items():
            peak[tier] += count
        loading = LOADED_AT_ONCE * max(self.sizes.values())
        checked = sum(self.sizes.values()) if self.is_resident else self.first_layers_bytes
        if self.own_memory:
            if self.is_resident:
                peak["device"] = max(peak["device"], checked + self.checking_bytes)
            peak["host"] = max(peak["host"], resting["host"] + loading)
        else:
            ram = peak.pop("device") + peak["host"]
            peak["host"] = max(ram, resting["device"] + resting["host"] + loading, checked + self.checking_bytes)
        return peak

    def describe(self) -> str:
        """Say in a few words where the weights are."""
        return ", ".join(
            f"{gib(size)} ({share:.0%}) on the {tier}"
            for (tier, size), share in zip(self.weight_bytes.items(), self.shares, strict=True)
            if size
        )

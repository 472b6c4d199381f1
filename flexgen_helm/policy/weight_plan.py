"""Weight plan: the tier of every unit of a model, and the bytes that weights take on each tier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.tiers import interleave
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.types import TIERS, Shares, Tier


@dataclass(frozen=True)
class WeightPlan:
    """A tier for every unit of a model: embeddings, layers and output head."""

    shapes: ModelShapes
    tiers: Mapping[int, Tier]
    """Tier of each unit, by its number: -1 for embeddings, 0 to L - 1 for layers, L for an output head of its own."""
    own_memory: bool
    """Whether the device has a memory of its own."""
    prefetch: int
    """Units that are loaded ahead of their use."""

    @classmethod
    def by_shares(cls, shapes: ModelShapes, shares: Shares, *, own_memory: bool, prefetch: int) -> WeightPlan:
        """Spread the units evenly over the tiers, in the order of their use (FlexGen section 4.3; whole layers here).

        Embedding tables are never on disk, because single rows of them are read.
        """
        order = sorted(shapes.stored_bytes)
        tiers = dict(zip(order, interleave([shapes.stored_bytes[j] for j in order], shares), strict=True))
        if not own_memory:
            tiers[EMBEDDINGS] = "device" if shares[0] > 0 else "host"
        elif not shapes.has_own_head:  # the table is the head's matrix as well
            tiers[EMBEDDINGS] = "device"
        elif tiers[EMBEDDINGS] == "disk":
            tiers[EMBEDDINGS] = "host"
        return cls(shapes, tiers, own_memory, prefetch)

    @property
    def streamed(self) -> list[int]:
        """Numbers of the units that are loaded for every use."""
        elsewhere = TIERS[1:] if self.own_memory else TIERS[2:]
        return [j for j in self.shapes.bound_bytes if self.shapes.unpacks or self.tiers[j] in elsewhere]

    @property
    def is_resident(self) -> bool:
        """Whether all weights are used where they are stored, so that none are loaded."""
        return not self.streamed and (not self.own_memory or self.tiers[EMBEDDINGS] == "device")

    @property
    def on_disk(self) -> list[int]:
        """Numbers of the units that are stored in slab files."""
        return [j for j in self.shapes.bound_bytes if self.tiers[j] == "disk"]

    @property
    def num_slots(self) -> int:
        """Streamed units that are on the device at a time."""
        return min(self.prefetch + 1, len(self.streamed))

    @property
    def weight_bytes(self) -> dict[Tier, int]:
        """Bytes of weights that are stored on each tier."""
        return self._sums(self.shapes.stored_bytes, TIERS)

    @property
    def resident_bytes(self) -> dict[Tier, int]:
        """Bytes of weights on device and host that are used where they are stored."""
        streamed = set(self.streamed)
        return self._sums((j for j in self.shapes.stored_bytes if j not in streamed), TIERS[:2])

    @property
    def bytes_per_sweep(self) -> dict[str, int]:
        """Bytes of weights that a sweep in column order brings to the device, as ``from_host`` and ``from_disk``."""
        return {f"from_{tier}": count for tier, count in self._sums(self.streamed, TIERS[1:]).items()}

    @property
    def shares(self) -> Shares:
        """Realised shares of the weights on device, host and disk, in whole units."""
        total, found = max(1, self.shapes.total_bytes), self.weight_bytes
        return found["device"] / total, found["host"] / total, found["disk"] / total

    @property
    def needed_bytes(self) -> dict[Tier, int]:
        """Bytes of each tier that weights take, slots and read-ahead buffers included."""
        needed, stored, bound = self.weight_bytes, self.shapes.stored_bytes, self.shapes.bound_bytes
        if self.own_memory or self.shapes.unpacks:
            needed["device"] += self.num_slots * max((bound[j] for j in self.streamed), default=0)
        if self.own_memory and self.shapes.unpacks:
            needed["device"] += max(stored[j] for j in self.streamed)  # a stored slab arrives before it is unpacked
        needed["host"] += min(self.num_slots, len(self.on_disk)) * max((stored[j] for j in self.on_disk), default=0)
        return needed

    def describe(self) -> str:
        """Return the bytes and shares of weights on each tier, in words."""
        return ", ".join(
            f"{gib(size)} ({share:.0%}) on the {tier}"
            for (tier, size), share in zip(self.weight_bytes.items(), self.shares, strict=True)
            if size
        )

    def _sums(self, units: Iterable[int], tiers: Iterable[Tier]) -> dict[Tier, int]:
        chosen = list(units)
        return {tier: sum(self.shapes.stored_bytes[j] for j in chosen if self.tiers[j] == tier) for tier in tiers}

"""Weight plan: the tier of every unit of a model, and the bytes that weights take on each tier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.tiers import interleave
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.schedule.operations import head_unit
from flexgen_helm.types import TIERS, Shares, Tier

Value = TypeVar("Value")


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
        elif shapes.has_head and not shapes.has_own_head:  # the table is the head's matrix as well
            tiers[EMBEDDINGS] = "device"
        elif tiers[EMBEDDINGS] == "disk":
            tiers[EMBEDDINGS] = "host"
        return cls(shapes, tiers, own_memory, prefetch)

    def numbered_from(self, first: int, num_layers: int) -> WeightPlan:
        """Return the plan of a stage with the numbers that its units have in the whole model.

        Args:
            first: Number of its first layer.
            num_layers: Layers of the whole model.
        """
        head = head_unit(self.shapes.num_layers)
        numbers = {j: j if j == EMBEDDINGS else head_unit(num_layers) if j == head else j + first for j in self.tiers}

        def of(values: Mapping[int, Value]) -> dict[int, Value]:
            return {numbers[j]: value for j, value in values.items()}

        shapes = replace(
            self.shapes,
            stored_bytes=of(self.shapes.stored_bytes),
            carried_bytes=of(self.shapes.carried_bytes),
            bound_bytes=of(self.shapes.bound_bytes),
            disk_bytes=of(self.shapes.disk_bytes),
        )
        return replace(self, shapes=shapes, tiers=of(self.tiers))

    @property
    def streamed(self) -> list[int]:
        """Numbers of the units that are loaded for every use."""
        elsewhere = TIERS[1:] if self.own_memory else TIERS[2:]
        return [j for j in self.shapes.bound_bytes if self.shapes.is_packed or self.tiers[j] in elsewhere]

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
        """Bytes of weights that are kept on each tier."""
        return self._sums(self.shapes.stored_bytes, TIERS)

    @property
    def resident_bytes(self) -> dict[Tier, int]:
        """Bytes of weights on device and host that are used where they are stored."""
        streamed = set(self.streamed)
        return self._sums((j for j in self.shapes.stored_bytes if j not in streamed), TIERS[:2])

    @property
    def bytes_per_sweep(self) -> dict[str, int]:
        """Bytes of weights that a sweep in column order reads (``from_disk``) and brings over the link (``to_device``)."""
        coming = [j for j in self.streamed if self.own_memory and self.tiers[j] != "device"]
        from_disk, carried = self._sums(self.on_disk, ["disk"])["disk"], self.shapes.carried_bytes
        return {"from_disk": from_disk, "to_device": sum(carried[j] for j in coming)}

    @property
    def shares(self) -> Shares:
        """Realised shares of the weights on device, host and disk, in whole units, all in the form of host memory."""
        total, sizes = max(1, self.shapes.total_bytes), self.shapes.stored_bytes
        device, host, disk = (sum(size for j, size in sizes.items() if self.tiers[j] == tier) / total for tier in TIERS)
        return device, host, disk

    @property
    def needed_bytes(self) -> dict[Tier, int]:
        """Bytes of each tier that weights take, slots and read-ahead buffers included."""
        needed, shapes = self.weight_bytes, self.shapes
        if self.own_memory or shapes.is_packed or shapes.is_coded:
            needed["device"] += self.num_slots * max((shapes.bound_bytes[j] for j in self.streamed), default=0)
        if self.own_memory and shapes.is_packed:  # a carried slab arrives before it is unpacked
            needed["device"] += self._largest_carried(TIERS[1:])
        if self.own_memory and shapes.is_coded:  # a slab is decoded before it is carried
            needed["host"] += self._largest_carried(TIERS[1:] if shapes.is_packed else TIERS[2:])
        buffers = min(self.num_slots, len(self.on_disk))
        needed["host"] += buffers * max((shapes.disk_bytes[j] for j in self.on_disk), default=0)
        return needed

    @property
    def bits_on_disk(self) -> float | None:
        """Bits of a weight in slabs on disk; None if there are none."""
        count = sum(self.shapes.bound_bytes[j] for j in self.on_disk) / self.shapes.itemsize
        return 8 * sum(self.shapes.disk_bytes[j] for j in self.on_disk) / count if count else None

    def describe(self) -> str:
        """Return the bytes and shares of weights on each tier, in words."""
        return ", ".join(
            f"{gib(size)} ({share:.0%}) on the {tier}"
            for (tier, size), share in zip(self.weight_bytes.items(), self.shares, strict=True)
            if size
        )

    def _kept(self, j: int) -> int:
        """Return the bytes of a unit where it is kept."""
        shapes = self.shapes
        if j == EMBEDDINGS or self.tiers[j] == "host" or (self.tiers[j] == "device" and not self.own_memory):
            return shapes.stored_bytes[j]
        return (shapes.disk_bytes if self.tiers[j] == "disk" else shapes.carried_bytes)[j]

    def _largest_carried(self, tiers: Iterable[Tier]) -> int:
        """Return the bytes of the largest carried slab of the units on some tiers."""
        return max((size for j, size in self.shapes.carried_bytes.items() if self.tiers[j] in tiers), default=0)

    def _sums(self, units: Iterable[int], tiers: Iterable[Tier]) -> dict[Tier, int]:
        chosen = list(units)
        return {tier: sum(self._kept(j) for j in chosen if self.tiers[j] == tier) for tier in tiers}

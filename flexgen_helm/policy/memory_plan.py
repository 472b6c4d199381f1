"""Memory plan: the bytes that an engine takes on each tier, computed before anything is allocated (FlexGen section 4.3).

Weights, cache and working memory are computed in a file each and added here. Nothing else computes bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexgen_helm.errors import PolicyError
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, Form
from flexgen_helm.memory.amounts import gib
from flexgen_helm.policy import working_memory
from flexgen_helm.policy.cache_plan import CachePlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.shortage import Shortage, describe_shortage
from flexgen_helm.policy.space import Space, pool_name
from flexgen_helm.policy.stages.row_travel import travel_bytes
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.run_stats import RunStats
from flexgen_helm.types import ON_DEVICE, TIERS, Policy, ResolvedPolicy, Shares, Tier

FITS_SHARE = 0.8
"""A model fits on the device if it takes at most this share of it: K, V, hidden states and logits need the remaining memory."""
FILL_SHARE = 0.9
"""Share of a tier that is filled if a model fits on none, and share of that which cache or weights may take before the other.
Each sweep reads the weights once for all sequences, so memory is worth more for another sequence than for another layer."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of weights, cache and working memory on each tier."""

    shapes: ModelShapes
    policy: ResolvedPolicy
    space: Space
    weights: WeightPlan
    cache: CachePlan

    @classmethod
    def of(cls, shapes: ModelShapes, policy: ResolvedPolicy, space: Space, asked: Policy | None = None) -> MemoryPlan:
        """Plan the memory of an engine.

        Args:
            shapes: Sizes of the model.
            policy: Policy with the shares of weights. If they are None, everything is put on the device if it fits, else
                device, host and disk are filled in this order.
            space: Bytes of each tier that may be used.
            asked: Policy of the user, for messages; None: ``policy``.

        Raises:
            PolicyError: If the engine does not fit where the policy puts it.
        """
        whole = cls._placed(shapes, policy, space, ON_DEVICE)
        on_disk = cls._placed(shapes, policy, space, (0.0, 0.0, 1.0))
        if policy.weights == ON_DEVICE or (policy.weights is None and whole._fits_on_the_device()):
            plan = whole
        elif policy.weights is not None:
            plan = cls._placed(shapes, policy, space, policy.weights)
        else:
            filled = cls._placed(shapes, policy, space, whole._filling_shares())
            plan = next((each for each in (filled, on_disk, whole) if each.has_room), filled)
        if not plan.has_room:
            least = least_memory(whole, replace(on_disk, weights=replace(on_disk.weights, prefetch=1)))
            raise PolicyError(describe_shortage(plan._shortage(least), policy, asked or policy))
        return plan

    @classmethod
    def _placed(cls, shapes: ModelShapes, policy: ResolvedPolicy, space: Space, shares: Shares) -> MemoryPlan:
        own_memory = space.own_memory
        weights = WeightPlan.by_shares(shapes, shares, own_memory=own_memory, prefetch=policy.prefetch)
        return cls(shapes, policy, space, weights, CachePlan.of(shapes, policy, own_memory=own_memory))

    def with_slabs(self, disk_bytes: Mapping[int, int]) -> MemoryPlan:
        """Return the plan with the real bytes of slabs on disk, by the numbers of their units."""
        shapes = replace(self.shapes, disk_bytes={**self.shapes.disk_bytes, **disk_bytes})
        return replace(self, shapes=shapes, weights=replace(self.weights, shapes=shapes))

    @property
    def working_bytes(self) -> int:
        """Bytes of working memory on the device: activations, hidden states and logits; in one RAM a process's objects too."""
        objects = 0 if self.space.own_memory else working_memory.OBJECT_BYTES
        computing = working_memory.working_bytes(self.shapes, self.policy, is_mapped=self.maps_large_tensors)
        return self._scratch_bytes + objects + computing

    @property
    def maps_large_tensors(self) -> bool:
        """Whether large tensors have memory of their own: a CPU streams weights (`flexgen_helm.memory.allocator`)."""
        return bool(self.weights.streamed) and not self.space.is_gpu

    @property
    def travel_bytes(self) -> int:
        """Bytes of rows on their way between stages of a pipeline; 0 without."""
        return travel_bytes(self.shapes, self.policy, working_memory.least_block_tokens(self.policy))

    @property
    def host_rows_bytes(self) -> int:
        """Those that are on the host beside a device with a memory of its own.

        They are working memory of the device too: stages decide when they meet whether rows travel between hosts or devices.
        """
        return self.travel_bytes if self.space.own_memory else 0

    @property
    def checking_bytes(self) -> int:
        """Bytes that the self-check takes in addition to the layers that it checks."""
        whole = self.weights.is_resident
        return self._scratch_bytes + working_memory.checking_bytes(self.shapes, self.policy, whole=whole)

    @property
    def _scratch_bytes(self) -> int:
        """Bytes that kernels take for a moment, whatever the row sizes."""
        return self.space.scratch_bytes + (0 if self.space.is_gpu else working_memory.widening_bytes(self.shapes))

    @property
    def has_room(self) -> bool:
        """Whether everything fits into the space."""
        return all(count <= self.space.of(tier) for tier, count in self.peak_bytes.items())

    @property
    def peak_bytes(self) -> dict[Tier, int]:
        """Most bytes that each tier needs at any time, with the smallest cache; one sum as host if device and host are one."""
        return self.peak_with({})

    def peak_with(self, cache: Mapping[Tier, int]) -> dict[Tier, int]:
        """Return `peak_bytes` with a larger cache.

        Args:
            cache: Bytes of K and V on each tier; at least those of the smallest cache count.
        """
        weights, shapes = self.weights, self.shapes
        peak = self.running_with({tier: max(count, cache.get(tier, 0)) for tier, count in self.cache.least_bytes.items()})
        stored, loading = weights.weight_bytes, shapes.loading_bytes
        checking = (shapes.total_bytes if weights.is_resident else shapes.first_layers_bytes) + self.checking_bytes
        if self.space.own_memory:
            if weights.is_resident:
                peak["device"] = max(peak["device"], checking)
            peak["host"] = max(peak["host"], stored["host"] + loading)
        else:
            peak["host"] = max(peak["host"], stored["device"] + stored["host"] + loading, checking)
        return peak

    def running_with(self, cache: Mapping[Tier, int]) -> dict[Tier, int]:
        """Return the most bytes that each tier needs while jobs run, loading and the self-check left out.

        Args:
            cache: Bytes of K and V on each tier.
        """
        peak = dict(self.weights.needed_bytes)
        peak["device"] += self.working_bytes
        peak["host"] += self.host_rows_bytes
        return self._in_tiers({tier: count + cache.get(tier, 0) for tier, count in peak.items()})

    def _in_tiers(self, found: dict[Tier, int]) -> dict[Tier, int]:
        """Return bytes by tier, with those of the device added to the host's if they are one."""
        if not self.space.own_memory:
            found["host"] += found.pop("device")
        return found

    def left(self, free: Mapping[Tier, int]) -> dict[Tier, int]:
        """Return the bytes of each tier that remain once weights are loaded and working memory is reserved.

        Args:
            free: Bytes of each tier that are free now.
        """
        needed, working = (
            dict(self.weights.needed_bytes),
            {"device": self.working_bytes, "host": self.host_rows_bytes, "disk": 0},
        )
        if not self.space.own_memory:
            needed["device"] = needed["host"] = needed["device"] + needed["host"]
            working["host"] += working["device"]
        available = self.space.available
        return {tier: max(0, min(free[tier], available[tier] - needed[tier]) - working[tier]) for tier in TIERS}

    def block_tokens(self, left: Mapping[Tier, int]) -> int:
        """Return the prompt tokens of a block: the policy's, or as many as fit well into the remaining memory.

        Args:
            left: Bytes of each tier that may still be used.
        """
        return working_memory.block_tokens(self.shapes, self.policy, left["device"])

    def page_bytes(self, bytes_per_token: int) -> dict[Form, int]:
        """Return the bytes of a page in all layers, by form.

        Args:
            bytes_per_token: K and V of one token in all layers in the model's dtype, as the self-check measured them.
        """
        plain = PAGE_TOKENS * bytes_per_token * self.shapes.kv_itemsize // self.shapes.itemsize
        return {form: math.ceil(share * plain) for form, share in self.shapes.page_shares.items()}

    def held_bytes(self, stats: RunStats) -> dict[Tier, int]:
        """Return the most bytes that a run held on each tier; one sum as host if device and host are one.

        The runtime's own allocations are known by tier. Those of the computation count for the device, or for host and
        device as one: the growth of the process during the run, minus the growth of the runtime's allocations.
        """
        memory: Tier = "device" if self.space.own_memory else "host"
        held = self._in_tiers({tier: stats.tier_peak_bytes.get(tier, 0) for tier in TIERS})
        grown = max(0, held[memory] - self._in_tiers(dict(self.weights.needed_bytes))[memory])
        return held | {memory: held[memory] + max(0, stats.peak_bytes - stats.idle_bytes - grown)}

    def exceeded(self, stats: RunStats) -> str | None:
        """Return a text that names the tiers on which a run held more than the user allows; None if there are none."""
        held, allowed = self.held_bytes(stats), dict(self.space.limits)
        if "device" in allowed and "device" not in held:
            allowed["host"] = allowed.get("host", 0) + allowed.pop("device")
        found = [
            f"{gib(held[tier])} of {pool_name(tier, own_memory=self.space.own_memory)}, where max_memory allows "
            f"{gib(allowed[tier])}"
            for tier in allowed
            if held[tier] > allowed[tier]
        ]
        return "; ".join(found) or None

    def _shortage(self, least: Mapping[Tier, int]) -> Shortage:
        return Shortage(self.peak_bytes, least, self.working_bytes, self.checking_bytes, self.weights.describe(), self.space)

    def _fits_on_the_device(self) -> bool:
        return self._total("device") <= FITS_SHARE * self.space.of("device") and self.has_room

    def _total(self, tier: Tier) -> int:
        return self.shapes.total_on(tier, own_memory=self.space.own_memory)

    def _filling_shares(self) -> Shares:
        """Return the shares of weights that fill the memory left by a full cache: the device first, then host, then disk."""
        slots = (self.policy.prefetch + 1) * max(self.shapes.bound_bytes.values())
        buffers = (self.policy.prefetch + 1) * self.shapes.largest_bytes if self.shapes.is_coded else 0
        cache, loading = self.cache, self.shapes.loading_bytes
        if not self.space.own_memory:
            host = self._filled("host", slots + buffers + self.working_bytes, sum(map(cache.share_with_means, TIERS[:2])))
            return 0.0, host, max(0.0, 1 - host)
        arrival = max(self.shapes.carried_bytes.values()) if self.shapes.is_packed else 0
        taken = slots + arrival + self.working_bytes
        device = self._filled("device", taken + self._loaded_cache_bytes(taken, loading), cache.share_with_means("device"))
        host = self._host_share(loading, 1 - device)
        if device + host < 1:
            decoded = max(self.shapes.carried_bytes.values()) if self.shapes.is_coded else 0
            host = self._host_share(max(loading, slots + decoded), 1 - device)
        return device, host, max(0.0, 1 - device - host)

    def _usable(self, tier: Tier, taken: int) -> float:
        """Return the bytes of a tier for weights and cache; realised shares may differ by a unit."""
        largest = self.shapes.largest_on(tier, own_memory=self.space.own_memory)
        return max(0.0, FILL_SHARE * self.space.of(tier) - taken - largest)

    def _most(self, tier: Tier, taken: int) -> int:
        """Return the bytes of a tier for weights beside the smallest cache."""
        largest = self.shapes.largest_on(tier, own_memory=self.space.own_memory)
        return self.space.of(tier) - taken - largest - self.cache.least_bytes[tier]

    def _filled(self, tier: Tier, taken: int, cache_share: float) -> float:
        """Return the share of the weights that a tier has room for once the cache is there."""
        usable, total = self._usable(tier, taken), self._total(tier)
        cache_bytes = cache_share * self.cache.full_bytes(self.policy.block_size)
        return max(0.0, min(total, usable - min(cache_bytes, FILL_SHARE * usable), self._most(tier, taken))) / total

    def _host_share(self, taken: int, wanted: float) -> float:
        """Return the share of the weights for a host beside a device; all that are wanted come before the cache if they fit.

        Otherwise they would be on the disk, from which they come ten times as slowly.
        """
        if wanted * self.shapes.total_bytes <= min(FILL_SHARE * self._usable("host", taken), self._most("host", taken)):
            return wanted
        return min(wanted, self._filled("host", taken, self.cache.share_with_means("host")))

    def _loaded_cache_bytes(self, taken: int, loading: int) -> int:
        """Return the bytes of the device for the rows that have pages of one layer loaded from a cache on the host."""
        usable = self._usable("host", loading)
        on_device = self._usable("device", taken) / self._total("device")
        weights = self.shapes.total_bytes * (1 - on_device)
        room = usable - weights if weights <= FILL_SHARE * usable else FILL_SHARE * usable
        cache_bytes = min(self.cache.shares[1] * self.cache.full_bytes(self.policy.block_size), room)
        return int(self.cache.rows_at_once * cache_bytes / self.shapes.num_layers)


def least_memory(*plans: MemoryPlan) -> dict[Tier, int]:
    """Return the bytes of device and host that the smallest of several plans needs, by their sum."""
    needs: list[dict[Tier, int]] = [
        {tier: count for tier, count in plan.peak_bytes.items() if tier != "disk"} for plan in plans
    ]
    return min(needs, key=lambda need: sum(need.values()))

"""Cache plan: the bytes that K and V take on each tier, slots and transfer buffers included."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_helm.kv_cache.pages import NUM_BUFFERS, PAGE_TOKENS, TRANSFER_BYTES
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.working_memory import host_attention_bytes
from flexgen_helm.schedule.dependencies import rows_at_once
from flexgen_helm.schedule.exact_tables import NUM_SPARE, SEQUENCE_PAGES
from flexgen_helm.types import TIERS, ResolvedPolicy, Shares, Tier

CACHE_SHARE = 0.95
"""Share of a tier's remaining bytes that K and V may take; the margin is for errors of the estimates."""
SEQUENCE_TOKENS = 512
"""Tokens of a sequence for whose K and V the weights leave room."""


@dataclass(frozen=True)
class CachePlan:
    """A plan of the K/V cache: its shares on the tiers, and the bytes that they take."""

    shares: Shares
    bytes_per_token: int
    """K and V of one token in all layers, sealed if there are sealed pages."""
    num_layers: int
    """Decoder layers. Pages are brought to the device one layer at a time; stored ones grow K of a layer, then V, and so on."""
    rows_at_once: int
    """Rows whose pages are loaded on the device at a time; one row may need all pages of a layer."""
    own_memory: bool
    """Whether the device has a memory of its own; else device and host are the same RAM."""
    exact_bytes_per_token: int = 0
    """K and V of one token of a chunk that is not computed yet, beside sealed pages; 0: there are none."""
    mean_share: float = 0.0
    """Means of V for each byte of K and V on any tier; at most, since only sealed pages have means."""
    means_tier: Tier = "device"
    """Where they are: on the host if the CPU attends beside a device with a memory of its own."""
    disk_padding: float = 1.0
    """Bytes in the file for each byte of K and V on disk."""
    attention_bytes: int = 0
    """Bytes on the host of rows to which the CPU attends beside a device; 0: it attends to none."""

    @classmethod
    def of(cls, shapes: ModelShapes, policy: ResolvedPolicy, *, own_memory: bool) -> CachePlan:
        """Plan the cache of a model.

        Args:
            shapes: Sizes of the model.
            policy: Policy with the shares of the cache.
            own_memory: Whether the device has a memory of its own.
        """
        suspends = own_memory and policy.cpu_attention > 0
        rows = rows_at_once(suspends=suspends)
        sizes = {form: math.ceil(share * shapes.cache_bytes_per_token) for form, share in shapes.page_shares.items()}
        kept, beside = (sizes["sealed"], sizes["exact"]) if "sealed" in sizes else (sizes["exact"], 0)
        means = shapes.mean_share / shapes.page_shares["sealed"] if shapes.mean_share else 0.0
        on_host = suspends and policy.cache[1] > 0
        tier: Tier = "host" if on_host else "device"
        attention = host_attention_bytes(shapes, policy) if on_host else 0
        padding = max(shapes.disk_padding.values(), default=1.0)
        return cls(policy.cache, kept, shapes.num_layers, rows, own_memory, beside, means, tier, padding, attention)

    def share_with_means(self, tier: Tier) -> float:
        """Bytes of pages and means on a tier for one byte of cache."""
        return self.shares[TIERS.index(tier)] + self.mean_share * (tier == self.means_tier)

    @property
    def taken(self) -> dict[Tier, float]:
        """Bytes taken on each tier for one byte of cache; only host and disk if the device has no memory of its own."""
        taken: dict[Tier, float] = dict(zip(TIERS, self.shares, strict=True))
        ram = TIERS[0]
        if not self.own_memory:
            ram = "host"
            taken["host"] += taken.pop("device")
        brought = sum(share for tier, share in taken.items() if tier != ram)
        taken["host" if self.means_tier == "host" else ram] += self.mean_share
        taken[ram] += (taken[ram] / 2 + self.rows_at_once * brought) / self.num_layers
        taken["disk"] *= self.disk_padding
        return taken

    def taken_bytes(self, num_bytes: float) -> dict[Tier, int]:
        """Return the bytes taken on each tier by so many bytes of K and V."""
        return {tier: math.ceil(num_bytes * factor) for tier, factor in self.taken.items()}

    @property
    def buffer_bytes(self) -> dict[Tier, int]:
        """Bytes of buffers: those of the CPU's attention, and a ring for each form through which pages pass.

        Rings are on the host, with a twin on the device.
        """
        found: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        if self.shares[1] * self.own_memory + self.shares[2]:
            found["host"] = NUM_BUFFERS * TRANSFER_BYTES * (1 + (self.exact_bytes_per_token > 0))
            found["device"] = found["host"] * self.own_memory
            rows_from_disk = self.mean_share and self.shares[2]
            found["host"] += TRANSFER_BYTES * bool(rows_from_disk)
        found["host"] += self.attention_bytes
        return found

    @property
    def least_bytes(self) -> dict[Tier, int]:
        """Least bytes of each tier for which `capacities` hold one sequence, with pages more on each tier for rounding."""
        rounding = PAGE_TOKENS * sum(share > 0 for share in self.shares)
        sequence = (SEQUENCE_TOKENS + rounding) * self.bytes_per_token
        sequence += (PAGE_TOKENS * (NUM_SPARE + SEQUENCE_PAGES) + 2 * rounding) * self.exact_bytes_per_token
        buffers = self.buffer_bytes
        return {tier: math.ceil(share * sequence / CACHE_SHARE) + buffers[tier] for tier, share in self.taken.items()}

    def full_bytes(self, block_size: int) -> int:
        """Return the bytes of K and V of a block.

        Args:
            block_size: Sequences of the block, of `SEQUENCE_TOKENS` tokens each.
        """
        return block_size * self.sequence_bytes(SEQUENCE_TOKENS)

    def sequence_bytes(self, num_tokens: int) -> int:
        """Return the bytes of K and V of a prompt with one completion, of so many tokens together."""
        return num_tokens * self.bytes_per_token + PAGE_TOKENS * SEQUENCE_PAGES * self.exact_bytes_per_token

    def capacities(self, left: Mapping[Tier, int], most: float = math.inf) -> dict[Tier, int]:
        """Return the bytes of the cache on each tier: as many as fit into the remaining memory, in the policy's shares.

        Args:
            left: Bytes of each tier that may still be used.
            most: Most bytes that are useful, on all tiers together.
        """
        taken, buffers = self.taken, self.buffer_bytes
        room = {tier: CACHE_SHARE * (left[tier] - buffers[tier]) for tier in taken}
        total = max(0.0, min(most, *(room[tier] / share for tier, share in taken.items() if share)))
        return {tier: int(total * share) for tier, share in zip(TIERS, self.shares, strict=True)}

"""Capacity: bytes of the K/V cache and tokens of a block, which decide what a sweep can hold. No torch.

The engine and the planner both compute them here, from the bytes that are free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_helm.kv_cache.pages import Form, PagePool
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.schedule.packed import PackedScheduler
from flexgen_helm.types import TIERS, ResolvedPolicy, Tier

PROMPT_ROW_COST = 3.0
"""Time of a prefill row on a CPU, in units of a sweep that only decodes (measured in runs/LOG.md). On a GPU it is 0: loading
the weights takes longer than the row."""


@dataclass(frozen=True)
class Capacity:
    """What sweeps may hold.

    Attributes:
        cache_bytes: Bytes of K and V on each tier.
        block_tokens: Prompt tokens of a sweep.
    """

    cache_bytes: Mapping[Tier, int]
    block_tokens: int

    @classmethod
    def of(cls, plan: MemoryPlan, free: Mapping[Tier, int], most: float = math.inf) -> Capacity:
        """Compute the capacity that a plan leaves.

        Args:
            plan: The memory plan.
            free: Bytes of each tier that are free once weights are loaded.
            most: Most bytes of cache that are useful.
        """
        left = plan.left(free)
        return cls(plan.cache.capacities(left, most), plan.block_tokens(left))


def packed_scheduler(
    policy: ResolvedPolicy, capacity: Capacity, page_bytes: Mapping[Form, int], *, is_gpu: bool, keep_all: bool = False
) -> tuple[PackedScheduler, dict[Form, PagePool]]:
    """Make the scheduler of packed rows.

    Args:
        policy: Row sizes and shares.
        capacity: What sweeps may hold.
        page_bytes: Bytes of a page in all layers, by form.
        is_gpu: Whether the device is a GPU.
        keep_all: Whether the operations have another order than the column order, which needs K and V of all layers.

    Returns:
        The scheduler, and its pages by form. Each form may take all bytes; the scheduler divides them.
    """
    pools = {form: _pool(capacity.cache_bytes, policy, size) for form, size in page_bytes.items()}
    cost = 0.0 if is_gpu else PROMPT_ROW_COST
    scheduler = PackedScheduler(
        policy, block_tokens=capacity.block_tokens, pools=pools, keep_all=keep_all, prompt_row_cost=cost
    )
    return scheduler, pools


def _pool(cache_bytes: Mapping[Tier, int], policy: ResolvedPolicy, page_bytes: int) -> PagePool:
    on_device, on_host, on_disk = (cache_bytes[tier] // page_bytes for tier in TIERS)
    return PagePool(on_device, host=on_host, disk=on_disk, shares=policy.cache, page_bytes=page_bytes)

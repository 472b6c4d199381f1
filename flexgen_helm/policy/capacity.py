"""Capacity: bytes of the K/V cache and tokens of a block, which decide what a sweep can hold. No torch.

The engine and the planner both compute them here, from the bytes that are free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_helm.kv_cache.pages import Form, Lane, PagePool, num_pages
from flexgen_helm.policy.cache_plan import SEQUENCE_TOKENS
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.schedule.exact_tables import NUM_SPARE, SEQUENCE_PAGES
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


def page_pools(policy: ResolvedPolicy, capacity: Capacity, page_bytes: Mapping[Form, int]) -> dict[Form, PagePool]:
    """Return the kept pages by form. Each form may take all bytes; a scheduler divides them.

    Args:
        policy: Row sizes and shares.
        capacity: What sweeps may hold.
        page_bytes: Bytes of a page in all layers, by form.
    """
    return {form: _pool(capacity.cache_bytes, policy, size) for form, size in page_bytes.items()}


def packed_scheduler(
    policy: ResolvedPolicy, block_tokens: int, pools: Mapping[Form, PagePool], *, is_gpu: bool, keep_all: bool = False
) -> PackedScheduler:
    """Make the scheduler of packed rows.

    Args:
        policy: Row sizes and shares.
        block_tokens: Prompt tokens of a sweep.
        pools: Kept pages by form.
        is_gpu: Whether the device is a GPU.
        keep_all: Whether the operations have another order than the column order, which needs K and V of all layers.
    """
    cost = 0.0 if is_gpu else PROMPT_ROW_COST
    return PackedScheduler(policy, block_tokens=block_tokens, pools=pools, keep_all=keep_all, prompt_row_cost=cost)


def lane_schedulers(
    policy: ResolvedPolicy, block_tokens: int, pools: Mapping[Form, PagePool], *, lanes: int, is_gpu: bool
) -> list[PackedScheduler]:
    """Make the schedulers of lanes that divide the pages evenly.

    Args:
        policy: Row sizes and shares.
        block_tokens: Prompt tokens of a sweep.
        pools: Kept pages by form, of which none are taken. Where two forms share bytes, these are divided between them for
            good, for sequences of the usual length.
        lanes: Number of lanes.
        is_gpu: Whether the device is a GPU.
    """
    divide(pools, lanes=lanes)
    cost = 0.0 if is_gpu else PROMPT_ROW_COST
    of_lanes = [{form: pool.of_lane(Lane(index, lanes)) for form, pool in pools.items()} for index in range(lanes)]
    return [
        PackedScheduler(policy, block_tokens=block_tokens, pools=own, divided=True, prompt_row_cost=cost) for own in of_lanes
    ]


def divide(pools: Mapping[Form, PagePool], *, lanes: int) -> None:
    """Divide the bytes of two forms of pages between them for good, for sequences of `SEQUENCE_TOKENS` tokens."""
    if "sealed" not in pools:
        return
    exact, sealed = pools["exact"], pools["sealed"]
    spare = lanes * NUM_SPARE * exact.page_bytes
    of_sequence = SEQUENCE_PAGES * exact.page_bytes
    total = max(1, sum(sealed.most) * sealed.page_bytes)
    wanted = of_sequence / (of_sequence + num_pages(0, SEQUENCE_TOKENS) * sealed.page_bytes)
    share = min(1.0, (spare + max(0, total - spare) * wanted) / total)
    exact.resize(share)
    sealed.resize(1 - share)


def _pool(cache_bytes: Mapping[Tier, int], policy: ResolvedPolicy, page_bytes: int) -> PagePool:
    on_device, on_host, on_disk = (cache_bytes[tier] // page_bytes for tier in TIERS)
    return PagePool(on_device, host=on_host, disk=on_disk, shares=policy.cache, page_bytes=page_bytes)

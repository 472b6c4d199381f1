"""Where weights go, decided from sizes before anything is allocated (FlexGen section 4.3: shares; here of whole layers)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from transformers import PreTrainedModel

from flexgen_helm.errors import PolicyError
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.pages import PAGE_TOKENS
from flexgen_helm.memory.slab import SlabLayout, layout_of
from flexgen_helm.memory.staging import NUM_BUFFERS
from flexgen_helm.memory.tiers import interleave
from flexgen_helm.memory.working_set import TRANSFER_BYTES
from flexgen_helm.model.layers import layers_of, refuse_shared_layers
from flexgen_helm.policy.shortage import describe_shortage, pool_name
from flexgen_helm.policy.weight_plan import EMBEDDINGS, LOADED_AT_ONCE, Space, WeightPlan
from flexgen_helm.policy.working_memory import cache_bytes_per_token, checking_bytes, first_layers_bytes, working_bytes
from flexgen_helm.schedule.dependencies import rows_at_once
from flexgen_helm.types import TIERS, ResolvedPolicy, RunStats, Shares, Tier

FITS_SHARE = 0.8
"""A model fits on the device if it takes at most this share of it; the rest is for K, V, hidden states and logits."""
CACHE_SHARE = 0.95
"""Share of what is left of a tier that K and V may take; the rest is for what no estimate knows."""
FILL_SHARE = 0.9
"""Share of a tier that is filled where a model fits on none, and of this what the cache may have before weights: each sweep
reads the weights once for all sequences, so that memory is worth more for another sequence than for another layer."""
SEQUENCE_TOKENS = 512
"""Of the sequences for which weights leave room."""


def plan_weights(model: PreTrainedModel, policy: ResolvedPolicy, space: Space) -> WeightPlan:
    """Place the parts of a model.

    Args:
        model: On the meta device.
        policy: Its shares of weights; None: everything on the device if it fits, else device, host and disk are filled in
            this order.
        space: What may be used.

    Raises:
        PolicyError: If the weights do not fit where the policy puts them.
        UnsupportedModel: If layers share weights, so that they cannot be placed one by one.
    """
    layouts, sizes = _parts(model)
    tiers = dict.fromkeys(sizes, TIERS[0])
    whole = WeightPlan(
        layouts,
        tiers,
        sizes,
        len(layers_of(model)),
        space.own_memory,
        policy.prefetch,
        working_bytes(model, policy),
        checking_bytes(model, policy),
        first_layers_bytes(model),
        _cache_room(model, policy, own_memory=space.own_memory),
    )
    on_disk = dataclasses.replace(whole, tiers=_placed(whole, (0.0, 0.0, 1.0)))
    if policy.weights == (1.0, 0.0, 0.0) or (policy.weights is None and _fits(whole, space)):
        plan = whole
    elif policy.weights is not None:
        plan = dataclasses.replace(whole, tiers=_placed(whole, policy.weights))
    else:
        cache = policy.block_size * SEQUENCE_TOKENS * cache_bytes_per_token(model)
        filled = dataclasses.replace(whole, tiers=_placed(whole, _filling_shares(whole, space, policy.cache, cache)))
        plan = next((each for each in (filled, on_disk, whole) if _has_room(each, space)), filled)
    if plan.streamed:
        refuse_shared_layers(model)
    if not _has_room(plan, space):
        least = least_memory(whole, dataclasses.replace(on_disk, prefetch=1))
        raise PolicyError(describe_shortage(plan, least, space, policy))
    return plan


def least_memory(*plans: WeightPlan) -> dict[Tier, int]:
    """Bytes of device and host that the plan needs which needs least of both."""
    needs: list[dict[Tier, int]] = [
        {tier: count for tier, count in plan.peak_bytes.items() if tier != "disk"} for plan in plans
    ]
    return min(needs, key=lambda need: sum(need.values()))


def left_bytes(plan: WeightPlan, space: Space, free: Mapping[Tier, int]) -> dict[Tier, int]:
    """What may be used of each tier beside the weights, which are loaded, and the least that computing takes.

    Args:
        plan: Of the weights.
        space: What may be used of each tier.
        free: What is free of each tier now.
    """
    needed, working = dict(plan.needed_bytes), {"device": plan.working_bytes, "host": 0, "disk": 0}
    if not space.own_memory:
        needed["device"] = needed["host"] = needed["device"] + needed["host"]
        working["host"] = working["device"]
    return {tier: max(0, min(free[tier], space.available[tier] - needed[tier]) - working[tier]) for tier in TIERS}


def cache_capacities(
    shares: Shares, left: Mapping[Tier, int], *, own_memory: bool, num_layers: int, rows_at_once: int
) -> dict[Tier, int]:
    """Bytes of the cache on each tier: as many as fit, in the shares of a policy, with the room through which they pass.

    Args:
        shares: Of the cache.
        left: What may be used of each tier; without a device memory of its own, device and host are the same.
        own_memory: Whether the device has a memory of its own.
        num_layers: Their pages are brought one layer at a time; they grow K of a layer, then V, and so on.
        rows_at_once: Rows whose pages are there at a time; one may have all pages of a layer.
    """
    wanted, buffers = _cache_shares(shares, own_memory=own_memory, num_layers=num_layers, rows_at_once=rows_at_once)
    room = {tier: CACHE_SHARE * (left[tier] - (tier == "host" and buffers)) for tier in wanted}
    total = max(0.0, min(room[tier] / share for tier, share in wanted.items() if share))
    return {tier: int(total * share) for tier, share in zip(TIERS, shares, strict=True)}


def _cache_shares(shares: Shares, *, own_memory: bool, num_layers: int, rows_at_once: int) -> tuple[dict[Tier, float], int]:
    """What a byte of the cache takes of each tier, and the buffers on the host through which it passes."""
    wanted: dict[Tier, float] = dict(zip(TIERS, shares, strict=True))
    ram = TIERS[0]
    if not own_memory:
        ram = "host"
        wanted["host"] += wanted.pop("device")
    brought = sum(share for tier, share in wanted.items() if tier != ram)
    wanted[ram] += (wanted[ram] / 2 + rows_at_once * brought) / num_layers
    return wanted, NUM_BUFFERS * TRANSFER_BYTES if brought else 0


def _cache_room(model: PreTrainedModel, policy: ResolvedPolicy, *, own_memory: bool) -> dict[Tier, int]:
    """What must be left of each tier for `cache_capacities` to hold one sequence; on each tier a page may be cut."""
    wanted, buffers = _cache_shares(
        policy.cache,
        own_memory=own_memory,
        num_layers=len(layers_of(model)),
        rows_at_once=rows_at_once(suspends=own_memory and policy.cpu_attention > 0),
    )
    rounding = PAGE_TOKENS * sum(share > 0 for share in policy.cache)
    sequence = (SEQUENCE_TOKENS + rounding) * cache_bytes_per_token(model)
    return {tier: math.ceil(share * sequence / CACHE_SHARE) + (tier == "host" and buffers) for tier, share in wanted.items()}


def exceeded(limits: Mapping[Tier, int], stats: RunStats, needed: Mapping[Tier, int], *, own_memory: bool) -> str | None:
    """Say where a run held more than the user allows, by what was measured.

    What the runtime allocates is known by tier. What the computation took beside it counts for the device: how far the process
    grew during the run, less what of the growth was the runtime's.

    Args:
        limits: What the user allows.
        stats: Of the run.
        needed: Bytes of each tier that were held before the run: weights, slots and buffers.
        own_memory: Whether the device has a memory of its own.
    """
    held = {tier: stats.tier_peak_bytes.get(tier, 0) for tier in TIERS}
    grown = sum(max(0, held[tier] - needed[tier]) for tier in (TIERS[:1] if own_memory else TIERS[:2]))
    held["device"] += max(0, stats.peak_bytes - stats.idle_bytes - grown)
    allowed = dict(limits)
    if not own_memory and {"device", "host"} & limits.keys():
        held["host"] += held.pop("device")
        allowed["host"] = limits.get("host", 0) + allowed.pop("device", 0)
    found = [
        f"{gib(held[tier])} of {pool_name(tier, own_memory=own_memory)}, where max_memory allows {gib(allowed[tier])}"
        for tier in allowed
        if held[tier] > allowed[tier]
    ]
    return "; ".join(found) or None


def _parts(model: PreTrainedModel) -> tuple[dict[int, SlabLayout], dict[int, int]]:
    """Layouts of layers and head, and bytes of all parts; what is small and outside of them counts as embeddings."""
    layers = layers_of(model)
    layouts = {j: layout_of(layer) for j, layer in enumerate(layers)}
    head = model.get_output_embeddings()
    tied = set(model.all_tied_weights_keys)
    if head is not None and not any(model.get_parameter_or_buffer(key) is head.weight for key in tied):
        layouts[len(layers)] = layout_of(head)
    sizes = {j: layout.num_bytes for j, layout in layouts.items()}
    total = sum(tensor.nbytes for key, tensor in model.state_dict().items() if key not in tied)
    sizes[EMBEDDINGS] = max(0, total - sum(sizes.values()))
    return layouts, sizes


def _fits(whole: WeightPlan, space: Space) -> bool:
    return sum(whole.sizes.values()) <= FITS_SHARE * space.of("device") and _has_room(whole, space)


def _has_room(plan: WeightPlan, space: Space) -> bool:
    return all(count <= space.of(tier) for tier, count in plan.peak_bytes.items())


def _filling_shares(whole: WeightPlan, space: Space, cache: Shares, cache_bytes: int) -> Shares:
    """What a full cache leaves of the device, then of the host, and the rest on disk."""
    total = sum(whole.sizes.values())
    slots = (whole.prefetch + 1) * max(layout.num_bytes for layout in whole.layouts.values())
    largest = max(whole.sizes.values())  # shares are real to within a part

    def room(tier: Tier, taken: int, cache_share: float) -> float:
        usable = max(0, FILL_SHARE * space.of(tier) - taken - largest)
        filled = usable - min(cache_share * cache_bytes, FILL_SHARE * usable)
        most = space.of(tier) - taken - largest - whole.cache_room[tier]
        return max(0.0, min(total, filled, most)) / total

    if not space.own_memory:
        device, host = 0.0, room("host", slots + whole.working_bytes, cache[0] + cache[1])
    else:
        device = room("device", slots + whole.working_bytes, cache[0])
        loading = LOADED_AT_ONCE * largest
        host = min(1.0 - device, room("host", loading, cache[1]))
        if device + host < 1:
            host = min(1.0 - device, room("host", max(loading, slots), cache[1]))
    return device, host, max(0.0, 1 - device - host)


def _placed(whole: WeightPlan, shares: Shares) -> dict[int, Tier]:
    """Tiers of all parts in the order in which they are used. Tables of which rows are taken are never on disk."""
    order = sorted(whole.sizes)
    tiers = dict(zip(order, interleave([whole.sizes[j] for j in order], shares), strict=True))
    if not whole.own_memory:
        tiers[EMBEDDINGS] = "device" if shares[0] > 0 else "host"
    elif len(order) - 1 > whole.num_layers:
        tiers[EMBEDDINGS] = "host" if tiers[EMBEDDINGS] == "disk" else tiers[EMBEDDINGS]
    else:  # the table is the head's matrix as well
        tiers[EMBEDDINGS] = "device"
    return tiers

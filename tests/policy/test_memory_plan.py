"""Memory plans: shares that are real to within a layer, limits that hold before anything is allocated."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flexgen_helm.errors import PolicyError
from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.kv_cache.cargo import Cargo
from flexgen_helm.kv_cache.page_format import CacheKey
from flexgen_helm.kv_cache.page_stores import DiskPages
from flexgen_helm.kv_cache.pages import NUM_BUFFERS, TRANSFER_BYTES
from flexgen_helm.memory.tiers import interleave
from flexgen_helm.policy.cache_plan import CACHE_SHARE, CachePlan
from flexgen_helm.policy.capacity import Capacity, page_pools
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import EMBEDDINGS, ModelShapes
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.policy.space import Space
from flexgen_helm.run_stats import RunStats
from flexgen_helm.types import TIERS, ResolvedPolicy, Shares, Tier

GIB = 2**30
KEY = CacheKey(0, 0)
CONFIG = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=20, num_attention_heads=8, vocab_size=1000)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG)
    return model


@functools.cache
def shapes(model: PreTrainedModel) -> ModelShapes:
    return shapes_of(model, plain_formats(model), torch.float32)


def plan_of(model: PreTrainedModel, policy: ResolvedPolicy, space: Space) -> MemoryPlan:
    return MemoryPlan.of(shapes(model), policy, space)


def policy(**fields: Any) -> ResolvedPolicy:
    return ResolvedPolicy(**{"gpu_batch_size": 64, "gpu_batch_tokens": 256, **fields})


def space(gib: float, *, own_memory: bool = True) -> Space:
    return Space(dict.fromkeys(TIERS, int(gib * GIB)), own_memory)


THIRDS = st.lists(st.integers(0, 10), min_size=3, max_size=3).filter(any)


@given(parts=THIRDS, sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=60))
def test_shares_are_real_to_within_one_part_everywhere(parts: list[int], sizes: list[int]) -> None:
    shares: Any = tuple(part / sum(parts) for part in parts)
    tiers = interleave(sizes, shares)
    for end in range(1, len(sizes) + 1):
        for tier, share in zip(TIERS, shares, strict=True):
            placed = sum(size for size, found in zip(sizes[:end], tiers[:end], strict=True) if found == tier)
            assert abs(placed - share * sum(sizes[:end])) <= 2 * max(sizes)
            assert share or not placed


def test_realised_shares_are_close_to_those_of_the_policy(model: PreTrainedModel) -> None:
    plan = plan_of(model, policy(weights=(0.2, 0.5, 0.3)), space(10))
    layer = plan.shapes.bound_bytes[0] / plan.shapes.total_bytes
    assert plan.weights.shares == pytest.approx((0.2, 0.5, 0.3), abs=layer)
    assert sum(plan.weights.weight_bytes.values()) >= sum(p.nbytes for p in model.parameters())
    assert plan.weights.streamed == [j for j in range(21) if plan.weights.tiers[j] != "device"]
    assert plan.weights.tiers[EMBEDDINGS] != "disk"


def test_without_a_device_memory_only_the_disk_is_streamed(model: PreTrainedModel) -> None:
    plan = plan_of(model, policy(weights=(0.2, 0.5, 0.3)), space(10, own_memory=False))
    assert plan.weights.streamed == plan.weights.on_disk == [j for j in range(21) if plan.weights.tiers[j] == "disk"]


def test_a_model_that_fits_stays_whole(model: PreTrainedModel) -> None:
    plan = plan_of(model, policy(), space(10))
    assert plan.weights.shares == (1.0, 0.0, 0.0)
    assert plan.weights.streamed == []


@pytest.mark.parametrize("own_memory", [True, False])
def test_without_a_cache_weights_fill_the_device_then_the_host_then_the_disk(model: PreTrainedModel, own_memory: bool) -> None:
    size = sum(p.nbytes for p in model.parameters())
    small = Space({"device": size // 2, "host": size // 2, "disk": 100 * GIB}, own_memory)
    plan = plan_of(model, policy(cache=(0, 0, 1)), small)
    assert plan.weights.weight_bytes["disk"] > 0
    for tier, peak in plan.peak_bytes.items():
        assert size / 4 < peak <= small.of(tier)


def test_a_full_cache_comes_before_weights(model: PreTrainedModel) -> None:
    """One more sequence saves a share of all sweeps, one more layer only of what is read in each."""
    size = sum(p.nbytes for p in model.parameters())
    small = Space({"device": size // 2, "host": size // 2, "disk": 100 * GIB}, False)
    plan = plan_of(model, policy(), small)
    left = small.of("host") - plan.peak_bytes["host"]
    assert plan.weights.weight_bytes["host"] < left
    few = plan_of(model, policy(gpu_batch_size=1, num_gpu_batches=1), small)
    assert few.weights.weight_bytes["host"] > size / 8


@settings(derandomize=True, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 500), st.integers(0, 500)),
    own_memory=st.booleans(),
    prefetch=st.integers(1, 3),
    cache=st.sampled_from([(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.2, 0.5, 0.3)]),
)
def test_automatic_shares_fit_wherever_the_disk_alone_does(
    model: PreTrainedModel, sizes: tuple[int, int], own_memory: bool, prefetch: int, cache: Shares
) -> None:
    small = Space({"device": sizes[0] * 2**20, "host": sizes[1] * 2**20, "disk": 100 * GIB}, own_memory)
    chosen = policy(prefetch=prefetch, cache=cache)
    try:
        plan_of(model, dataclasses.replace(chosen, weights=(0.0, 0.0, 1.0)), small)
    except PolicyError:
        return
    plan = plan_of(model, chosen, small)
    assert all(count <= small.of(tier) for tier, count in plan.peak_bytes.items())


@pytest.mark.parametrize(
    ("weights", "tier"), [((1, 0, 0), "device"), ((0, 1, 0), "host"), ((0, 0, 1), "disk"), ((0, 0.9, 0.1), "host")]
)
def test_what_does_not_fit_is_an_error_with_numbers(model: PreTrainedModel, weights: Shares, tier: str) -> None:
    size = sum(p.nbytes for p in model.parameters())
    available = {name: size // 3 if name == tier else 100 * size for name in TIERS}
    pool = "disk space" if tier == "disk" else f"{tier} memory"
    asked = re.escape(f"weights={tuple(map(float, weights))}")
    with pytest.raises(PolicyError, match=rf"{asked} needs 0.3\d GiB of {pool}, but 0.11 GiB are free.*Weights: \d") as refused:
        plan_of(model, policy(weights=weights), Space(available, True))
    assert "prefetch" not in str(refused.value)
    assert "cache" not in str(refused.value)


def test_a_disk_that_is_too_small_is_named(model: PreTrainedModel) -> None:
    available: dict[Tier, int] = {"device": 100 * GIB, "host": 100 * GIB, "disk": 2**20}
    with pytest.raises(PolicyError, match=r"of disk space, but 1.0 MiB are free in /some/folder\. .*Free disk space"):
        plan_of(model, policy(weights=(0, 0, 1)), Space(available, True, folder="/some/folder"))
    with pytest.raises(PolicyError, match=r"of disk space, but max_memory allows 1.0 MiB\. "):
        plan_of(model, policy(weights=(0, 0, 1)), Space(available, True, {"disk": 2**20}, folder="/some/folder"))


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"host": 20}, "max_memory allows 20.0 MiB"),
        ({"device": 15, "host": 5}, "max_memory allows 20.0 MiB"),
        ({"disk": 5}, "20.0 MiB are free"),
        ({"host": 30}, "20.0 MiB are free"),
        ({}, "20.0 MiB are free"),
    ],
)
def test_on_a_cpu_there_is_one_memory_and_the_message_says_who_limits_it(
    model: PreTrainedModel, limits: dict[Tier, int], words: str
) -> None:
    small = Space({"device": 20 << 20, "host": 20 << 20, "disk": 100 * GIB}, False, {t: n << 20 for t, n in limits.items()})
    with pytest.raises(PolicyError, match=rf"The least that this model runs in is .* of memory, but {words}\. ") as refused:
        plan_of(model, policy(), small)
    assert not re.search("device|host|weights=", str(refused.value))


@pytest.mark.parametrize("own_memory", [True, False])
@pytest.mark.parametrize("fields", [{}, {"weights": (1, 0, 0)}, {"prefetch": 3, "cache": (0.2, 0.5, 0.3)}])
def test_what_is_called_the_least_is_enough_and_no_byte_less(
    model: PreTrainedModel, fields: dict[str, Any], own_memory: bool
) -> None:
    plain = policy(**{**fields, "weights": None, "prefetch": 1})
    least = least_of(model, plain, own_memory)
    enough = Space({"device": least["host"], **least, "disk": 100 * GIB}, own_memory)
    plan_of(model, plain, enough)
    for tier in TIERS[:2] if own_memory else TIERS[1:2]:
        less = Space({**enough.available, tier: least[tier] - 1}, own_memory)
        with pytest.raises(PolicyError, match="The least that this model runs in"):
            plan_of(model, policy(**fields), less)


def least_of(model: PreTrainedModel, policy: ResolvedPolicy, own_memory: bool) -> dict[Tier, int]:
    """Returns the least memory that a placement of whole layers needs, of all placements that are tried."""
    found = []
    for parts in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5)):
        peak = plan_of(model, dataclasses.replace(policy, weights=parts), space(100, own_memory=own_memory)).peak_bytes
        found.append({tier: peak[tier] for tier in TIERS[:2] if tier in peak})
    return min(found, key=lambda peak: sum(peak.values()))


def test_slots_and_buffers_count(model: PreTrainedModel) -> None:
    chosen = policy(weights=(0, 0, 1), prefetch=3)
    plan = plan_of(model, chosen, space(10))
    largest = max(plan.shapes.bound_bytes.values())
    assert plan.weights.needed_bytes["device"] == 4 * largest
    assert plan.weights.needed_bytes["host"] == plan.shapes.stored_bytes[EMBEDDINGS] + 4 * largest
    peak = plan.peak_bytes
    assert peak["device"] == 4 * largest + plan.working_bytes + plan.cache.least_bytes["device"]
    assert peak["host"] == plan.weights.needed_bytes["host"]
    exact = Space(peak, True)
    assert plan_of(model, chosen, exact).weights.needed_bytes == plan.weights.needed_bytes
    for tier in TIERS:
        with pytest.raises(PolicyError, match=f"of {tier}"):
            plan_of(model, chosen, Space({**peak, tier: peak[tier] - 1}, True))


@pytest.mark.parametrize("own_memory", [True, False])
def test_memory_for_coded_slabs_counts(model: PreTrainedModel, own_memory: bool) -> None:
    """Beside the buffers into which they are read, they need slots on a CPU and a buffer for decoding beside a device."""
    chosen = policy(weights=(0, 0.5, 0.5), prefetch=2)
    sizes = dataclasses.replace(shapes(model), is_coded=True)
    plain = plan_of(model, chosen, space(10, own_memory=own_memory))
    coded = MemoryPlan.of(sizes, chosen, space(10, own_memory=own_memory))
    largest = max(sizes.bound_bytes[j] for j in coded.weights.on_disk)
    assert coded.weights.tiers == plain.weights.tiers
    more = {tier: coded.weights.needed_bytes[tier] - plain.weights.needed_bytes[tier] for tier in TIERS}
    assert more == ({"device": 0, "host": largest, "disk": 0} if own_memory else {"device": 3 * largest, "host": 0, "disk": 0})
    third = {j: size * 2 // 3 for j, size in sizes.bound_bytes.items()}
    real = coded.with_slabs(third)
    assert real.weights.weight_bytes["disk"] == sum(third[j] for j in coded.weights.on_disk)
    assert real.weights.bits_on_disk == pytest.approx(32 * 2 / 3, rel=1e-3)
    assert real.weights.shares == plain.weights.shares
    assert real.weights.needed_bytes["host"] == coded.weights.needed_bytes["host"] - 3 * (largest - largest * 2 // 3)
    assert coded.weights.bytes_per_sweep["from_disk"] == plain.weights.bytes_per_sweep["from_disk"]
    assert real.weights.bytes_per_sweep == {
        "from_disk": real.weights.weight_bytes["disk"],
        "to_device": sum(sizes.bound_bytes.values()) if own_memory else 0,
    }


@pytest.mark.parametrize("own_memory", [True, False])
def test_each_tier_counts_its_own_form(model: PreTrainedModel, own_memory: bool) -> None:
    """Weights that are stored in a quarter and carried in a half of their bytes, as entropy-coded ones are."""
    plain = shapes(model)
    quarter, half = ({j: size // part for j, size in plain.bound_bytes.items()} for part in (4, 2))
    table = plain.stored_bytes[EMBEDDINGS]
    sizes = dataclasses.replace(
        plain,
        stored_bytes={EMBEDDINGS: table, **quarter},
        carried_bytes=half,
        disk_bytes=quarter,
        is_coded=True,
        is_packed=True,
    )
    plan = MemoryPlan.of(sizes, policy(weights=(0.3, 0.3, 0.4)), space(10, own_memory=own_memory)).weights
    units = {tier: [j for j in quarter if plan.tiers[j] == tier] for tier in TIERS}
    assert all(units.values())
    on_device = half if own_memory else quarter
    kept = {tier: sum((on_device if tier == "device" else quarter)[j] for j in units[tier]) for tier in TIERS}
    kept[plan.tiers[EMBEDDINGS]] += table
    assert plan.weight_bytes == kept
    bound, carried = max(plain.bound_bytes.values()), max(half[j] for j in units["host"] + units["disk"])
    largest = max(quarter[j] for j in units["disk"])
    assert plan.needed_bytes == {
        "device": kept["device"] + 2 * bound + own_memory * carried,
        "host": kept["host"] + 2 * largest + own_memory * carried,
        "disk": kept["disk"],
    }
    assert plan.bytes_per_sweep == {
        "from_disk": kept["disk"],
        "to_device": own_memory * sum(half[j] for j in units["host"] + units["disk"]),
    }
    assert sizes.loading_bytes == max(quarter.values()) + max(half.values())


@settings(derandomize=True, deadline=None)
@given(device=st.integers(1, 600), host=st.integers(1, 600), coded=st.booleans())
def test_automatic_shares_of_packed_weights_fit(model: PreTrainedModel, device: int, host: int, coded: bool) -> None:
    plain = shapes(model)
    quarter, half = ({j: size // part for j, size in plain.bound_bytes.items()} for part in (4, 2))
    sizes = dataclasses.replace(
        plain,
        stored_bytes={EMBEDDINGS: plain.stored_bytes[EMBEDDINGS], **quarter},
        carried_bytes=half if coded else quarter,
        disk_bytes=quarter,
        is_coded=coded,
        is_packed=True,
    )
    small = Space({"device": device * 2**20, "host": host * 2**20, "disk": 100 * GIB}, True)
    try:
        MemoryPlan.of(sizes, policy(weights=(0.0, 0.0, 1.0)), small)
    except PolicyError:
        return
    plan = MemoryPlan.of(sizes, policy(), small)
    assert all(count <= small.of(tier) for tier, count in plan.peak_bytes.items())


@settings(derandomize=True, deadline=None)
@given(host=st.integers(0, 500), device=st.integers(0, 500), own_memory=st.booleans(), prefetch=st.integers(1, 3))
def test_automatic_shares_fit_with_coded_slabs(
    model: PreTrainedModel, host: int, device: int, own_memory: bool, prefetch: int
) -> None:
    sizes = dataclasses.replace(shapes(model), is_coded=True)
    small = Space({"device": device * 2**20, "host": host * 2**20, "disk": 100 * GIB}, own_memory)
    chosen = policy(prefetch=prefetch)
    try:
        MemoryPlan.of(sizes, dataclasses.replace(chosen, weights=(0.0, 0.0, 1.0)), small)
    except PolicyError:
        return
    plan = MemoryPlan.of(sizes, chosen, small)
    assert all(count <= small.of(tier) for tier, count in plan.peak_bytes.items())


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.sampled_from([(1, 0, 0), (0.5, 0.5, 0), (0, 1, 0), (0.5, 0.25, 0.25), (0, 0.25, 0.75), (0, 0, 1)]),
    st.tuples(*[st.integers(30, 1000)] * 3),
    st.booleans(),
    st.integers(1, 50),
    st.integers(2, 3),
)
def test_capacities_keep_shares_and_fit(
    shares: Shares, left: tuple[int, int, int], own_memory: bool, num_layers: int, rows_at_once: int
) -> None:
    mib: dict[Tier, int] = dict(zip(TIERS, (count << 20 for count in left), strict=True))
    if not own_memory:
        mib["device"] = mib["host"]
    found = CachePlan(shares, 1, num_layers, rows_at_once, own_memory).capacities(mib)
    total = sum(found.values())
    assert [found[tier] for tier in TIERS] == pytest.approx([share * total for share in shares], abs=len(TIERS))
    ram: Tier = "device" if own_memory else "host"
    held: dict[Tier, float] = {tier: found[tier] for tier in TIERS}
    if not own_memory:
        held["host"] += held.pop("device")
    brought = total - held[ram]
    held[ram] += (held[ram] / 2 + rows_at_once * brought) / num_layers  # one layer's K grows, rows have all pages of a layer
    held = {tier: count + NUM_BUFFERS * TRANSFER_BYTES * (brought > 0 and tier != "disk") for tier, count in held.items()}
    for tier, count in held.items():
        assert not total or count <= mib[tier] + len(TIERS)
    assert not total or any(held[tier] >= CACHE_SHARE * mib[tier] - 100 for tier in held)


@pytest.mark.parametrize("host", [0.9, 1.3, 2.0])
def test_weights_come_before_a_cache_on_the_host_if_they_fit_there(model: PreTrainedModel, host: float) -> None:
    size = sum(p.nbytes for p in model.parameters())
    small = Space({"device": size // 2, "host": int(host * size), "disk": 100 * GIB}, True)
    plan = plan_of(model, policy(cache=(0, 1, 0)), small)
    room = plan.cache.capacities(plan.left(small.available))["host"]
    assert (plan.weights.weight_bytes["disk"] == 0) == (host > 1)
    assert room >= size / 10


def test_what_attention_takes_for_a_moment_leaves_less_for_the_cache(model: PreTrainedModel) -> None:
    plain, scratch = (plan_of(model, policy(), dataclasses.replace(space(10), scratch_bytes=count)) for count in (0, GIB))
    free: dict[Tier, int] = dict.fromkeys(TIERS, 20 * GIB)
    assert plain.left(free)["device"] - scratch.left(free)["device"] == GIB
    assert scratch.peak_bytes["device"] - plain.peak_bytes["device"] == GIB


@pytest.mark.parametrize(("held", "said"), [(100, None), (101, "of host memory, where max_memory allows")])
def test_what_was_held_beyond_a_limit_is_said(model: PreTrainedModel, held: int, said: str | None) -> None:
    stats = RunStats(tier_peak_bytes={"host": held})
    limited = Space(dict.fromkeys(TIERS, 100 * GIB), True, {"host": 100})
    found = plan_of(model, policy(), limited).exceeded(stats)
    assert (said is None) == (found is None)
    assert (said or "") in (found or "")


@pytest.mark.parametrize("variant", [PLAIN_CACHE, CacheFormat(4, 4), CacheFormat(2, 8, sparsity=10), CacheFormat(sparsity=10)])
def test_the_file_of_a_cache_fits_on_the_disk_with_its_padding(
    model: PreTrainedModel, variant: CacheFormat, tmp_path: Path
) -> None:
    """Records are whole pages of memory, so that a file is larger than the K and V in it."""
    on_disk = policy(weights=(0, 1, 0), cache=(0, 0, 1))
    room = Space({**space(10).available, "disk": 200 * 2**20}, own_memory=True)
    plan = MemoryPlan.of(shapes_of(model, plain_formats(model), torch.float32, variant), on_disk, room)
    per_token = 2 * CONFIG.num_hidden_layers * CONFIG.hidden_size * 4
    pools = page_pools(on_disk, Capacity.of(plan, room.available), plan.page_bytes(per_token))
    kv = torch.empty(0, 8, 64)
    for form, page_format in variant.forms(kv, kv).items():
        store = DiskPages(tmp_path, 1, page_bytes=1)
        num_bytes = pools[form].capacities.disk * CONFIG.num_hidden_layers * store.transfer_bytes(Cargo(KEY, page_format))
        store.close()
        assert num_bytes <= room.available["disk"]
    assert num_bytes > 0.7 * room.available["disk"]


def test_weights_held_elsewhere_than_planned_are_no_growth(model: PreTrainedModel) -> None:
    plan = plan_of(model, policy(), space(10, own_memory=False))
    half = plan.weights.needed_bytes["device"] // 2
    stats = RunStats(tier_peak_bytes={"device": half, "host": half + 100}, idle_bytes=1000, peak_bytes=1250)
    assert plan.held_bytes(stats)["host"] == pytest.approx(2 * half + 250, abs=1)

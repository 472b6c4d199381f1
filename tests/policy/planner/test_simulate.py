"""The simulator against numbers that are derived by hand, and against a replay of everything."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.errors import OutOfSpace, PolicyError
from flexgen_helm.machine.profile import AttentionRate, LayerTime, MachineProfile, ProductRate, Rate
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.loads import RowLoad
from flexgen_helm.policy.planner.signature import signature
from flexgen_helm.policy.planner.simulate import simulate, timeline
from flexgen_helm.policy.planner.sweeps import sweep_loads
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload
from flexgen_helm.types import TIERS, Shares, Tier
from tests.policy.planner.made import KIB, MIB, machine_with, plan_with, policy_with, shapes_with

TWO_PROMPTS = Workload.uniform(2, 32, 0, score=True)
"""Two rows of 32 tokens, in one sweep."""
LAYER, RATE_32, RATE_16 = 64 * KIB, 1.5e8, 1e8
"""Bytes of a layer in 16 bits, and rates of products of rows of 32 and 16 tokens on the made-up machine."""
ROW = 2 * (LAYER / 2) * 32 / RATE_32 + 32 * 128 * (4 * 4 * 8) / 1e8
"""Products, and attention of 32 queries to a chunk of 128 keys with 4 heads of 8."""
HEAD = 2 * 128 * 32 * 16 / RATE_16 + 3 * 16 * 128 * 4 / 1e9
"""A slice of 16 positions of the output head, and the reading of its logits."""
RECORD = 2 * 32 * 32 * 2 / 1e9


def test_where_everything_is_resident_times_add_up() -> None:
    plan = plan_with(shapes_with(3), policy_with(), own_memory=False)
    found = simulate(plan, TWO_PROMPTS, machine_with(own_memory=False))
    # 31 tokens of each prompt are scored, in slices of 16 positions.
    assert found.seconds == pytest.approx(2 * RECORD + 3 * 2 * ROW + 4 * HEAD, rel=1e-9)
    assert found.busy_seconds == {"device": pytest.approx(found.seconds)}
    assert (found.sweeps, found.prompt_tokens, found.generated_tokens, found.bytes_moved) == (1, 64, 0, {})
    assert found.latency_seconds == pytest.approx(found.seconds)
    assert found.peak_bytes == plan.peak_bytes


def test_a_measured_layer_replaces_rates_but_for_earlier_chunks() -> None:
    shapes = shapes_with(3)
    names = {signature(shapes): 0.5, "another": 9.0}
    layers = tuple(LayerTime(name, "bfloat16", "prefill", 32, seconds) for name, seconds in names.items())
    machine = machine_with(own_memory=False, layers=layers)
    plan = plan_with(shapes, policy_with(block_tokens=192), own_memory=False)
    found = simulate(plan, Workload((PlannedPrompt(tuple(range(160)), (), score=True),)), machine)
    # The last of five rows has 32 queries behind a whole chunk.
    earlier = 32 * 128 * (4 * 4 * 8) / 1e8
    assert found.seconds == pytest.approx(5 * RECORD + 3 * (5 * 0.5 + earlier) + 10 * HEAD, rel=1e-9)


@pytest.mark.parametrize(
    ("known", "kept", "streamed"),
    [
        ({(False, False): 1.0, (False, True): 2.0, (True, False): 3.0}, 3.0, 2.0),
        ({(False, False): 1.0, (True, False): 3.0}, 3.0, 1.0),  # a profile from before, or written by hand
        ({(False, False): 1.0}, 1.0, 1.0),
    ],
)
def test_a_layer_takes_the_time_of_the_form_in_which_the_plan_holds_it(
    known: dict[tuple[bool, bool], float], kept: float, streamed: float
) -> None:
    shapes, row = shapes_with(3), RowLoad("prefill", 32, 0, 0)
    name = signature(shapes)
    layers = tuple(
        LayerTime(name, "bfloat16", "prefill", 32, seconds, packed=packed, mapped=mapped)
        for (packed, mapped), seconds in known.items()
    )
    machine = machine_with(own_memory=False, layers=layers)
    on_disk: dict[int, Tier] = dict.fromkeys(range(3), "disk")
    for tiers, seconds in (({}, kept), (on_disk, streamed)):
        durations = Durations(plan_with(shapes, policy_with(), tiers, own_memory=False), machine)
        assert durations.layer(0, row)[0].seconds == pytest.approx(seconds)


@pytest.mark.parametrize("own_memory", [True, False])
def test_bound_by_weights_a_run_takes_their_bytes_over_the_rate(own_memory: bool) -> None:
    """Reading begins once rows are recorded, and never pauses; behind the last layer's come its rows and the output head."""
    tiers: dict[int, Tier] = dict.fromkeys(range(5), "disk")
    plan = plan_with(shapes_with(5), policy_with(block_tokens=64), tiers, own_memory=own_memory)
    machine = machine_with(own_memory=own_memory, disk_read=Rate(1e6))
    found = simulate(plan, Workload.uniform(6, 32, 0, score=True), machine, exactly=True)
    link = LAYER / 1e7 if own_memory else 0.0
    assert found.sweeps == 3
    assert found.seconds == pytest.approx(2 * RECORD + 3 * 5 * LAYER / 1e6 + link + 2 * ROW + 4 * HEAD, rel=1e-9)
    assert found.binding == "disk_read"


def test_units_that_have_a_slot_each_are_loaded_once() -> None:
    tiers: dict[int, Tier] = {1: "host", 3: "host"}
    plan = plan_with(shapes_with(5), policy_with(block_tokens=64), tiers)
    found = simulate(plan, Workload.uniform(6, 32, 0, score=True), machine_with(), exactly=True)
    assert found.bytes_moved == {"host_to_device": 2 * LAYER}


def test_a_rate_that_is_missing_is_named() -> None:
    plan = plan_with(shapes_with(2), policy_with(), {0: "disk"})
    with pytest.raises(PolicyError, match="how fast disk read is"):
        simulate(plan, TWO_PROMPTS, machine_with(disk_read=None))


def test_a_prompt_that_never_fits_is_an_error() -> None:
    shapes = shapes_with(2, num_kv_heads=64, head_dim=128)
    plan = plan_with(shapes, policy_with(block_tokens=96), available=3 * MIB)
    with pytest.raises(OutOfSpace, match="do not fit into the cache"):
        simulate(plan, Workload.uniform(1, 2000, 8), machine_with())


def test_spans_of_a_sweep() -> None:
    tiers: dict[int, Tier] = dict.fromkeys(range(4), "host")
    plan = plan_with(shapes_with(4), policy_with(block_tokens=64), tiers)
    (load, *_) = sweep_loads(plan, Workload.uniform(6, 32, 0, score=True))
    spans = timeline(plan, load, machine_with())
    device = sorted((span for span in spans if span.resource == "device"), key=lambda span: span.begin)
    assert [span.name for span in device if span.name.startswith("compute")] == [
        f"compute {j},{k}" for j in range(4) for k in (0, 1)
    ]
    assert all(a.end <= b.begin + 1e-9 for a, b in pairwise(device))
    assert {span.resource for span in spans} == {"device", "host_to_device"}
    assert min(span.begin for span in spans) == 0.0


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(TIERS), min_size=2, max_size=8),
    st.sampled_from(["host_to_device", "device_to_host", "disk_read", "disk_write", "device_read"]),
    st.floats(1.0, 20.0),
    st.booleans(),
)
def test_more_bandwidth_is_never_slower(tiers: list[Tier], way: str, factor: float, own_memory: bool) -> None:
    machine = machine_with(own_memory=own_memory)
    faster = machine_with(own_memory=own_memory, **{way: Rate(getattr(machine, way).value * factor)})
    plan = plan_with(shapes_with(len(tiers)), policy_with(block_tokens=64), dict(enumerate(tiers)), own_memory=own_memory)
    workload = Workload.uniform(5, 40, 5)
    slow, fast = (simulate(plan, workload, each, exactly=True).seconds for each in (machine, faster))
    assert fast <= slow * (1 + 1e-9)


def large_machine(*, own_memory: bool) -> MachineProfile:
    rates = {"host_to_device": 12e9, "device_to_host": 12e9, "disk_read": 2e9, "disk_write": 1e9}
    return machine_with(
        own_memory=own_memory,
        is_gpu=own_memory,
        device_read=Rate(2.5e11),
        products=(ProductRate("bfloat16", 1, Rate(1e12)), ProductRate("bfloat16", 512, Rate(2.5e13))),
        attention=(
            AttentionRate("device", "prefill", "bfloat16", Rate(5e12)),
            AttentionRate("device", "decode", "bfloat16", Rate(1e11)),
            AttentionRate("host", "decode", "bfloat16", Rate(2e10)),
        ),
        call_seconds={"prefill": 2e-3, "decode": 1e-3},
        operation_seconds=2e-5,
        **{name: Rate(value) for name, value in rates.items()},
    )


def ragged(count: int) -> Workload:
    """Prompts of other lengths and answers, one third of which are only scored."""
    dice = random.Random(0)
    prompts = []
    for i in range(count):
        tokens = (i, *(dice.randrange(1000) for _ in range(dice.randrange(20, 700))))
        prompts.append(PlannedPrompt(tokens, () if i % 3 == 2 else (dice.randrange(2, 60),), score=i % 3 == 2))
    return Workload(tuple(prompts))


@pytest.mark.parametrize("workload", [Workload.uniform(40, 200, 24), ragged(36), Workload.uniform(40, 500, 0, score=True)])
@pytest.mark.parametrize(
    ("own_memory", "weights", "cache", "cpu"),
    [
        (True, (0.5, 0.5, 0.0), (0.0, 1.0, 0.0), 1.0),
        pytest.param(True, (0.0, 0.3, 0.7), (0.2, 0.4, 0.4), 0.0, marks=pytest.mark.slow),
        (False, (0.0, 0.7, 0.3), (0.5, 0.0, 0.5), 0.0),
        pytest.param(False, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0), 0.0, marks=pytest.mark.slow),
    ],
)
def test_samples_are_close_to_the_replay_of_everything(
    workload: Workload, own_memory: bool, weights: Shares, cache: Shares, cpu: float
) -> None:
    shapes = shapes_with(16, layer=60 * MIB, head=40 * MIB, hidden_size=2048, num_heads=16, num_kv_heads=16, head_dim=128)
    policy = policy_with(
        gpu_batch_size=16, gpu_batch_tokens=256, num_gpu_batches=3, block_tokens=1024, cache=cache, cpu_attention=cpu
    )
    plan = plan_with(shapes, policy, own_memory=own_memory, available=40 * 2**30)
    placed = MemoryPlan.of(shapes, replace(policy, weights=weights), plan.space)
    machine = large_machine(own_memory=own_memory)
    sampled, whole = (simulate(placed, workload, machine, exactly=exactly) for exactly in (False, True))
    assert sampled.seconds == pytest.approx(whole.seconds, rel=0.005)
    assert (sampled.sweeps, sampled.prompt_tokens) == (whole.sweeps, whole.prompt_tokens)
    assert sampled.generated_tokens == whole.generated_tokens == sum(sum(p.new_tokens) for p in workload.prompts)
    assert sampled.latency_seconds == pytest.approx(whole.latency_seconds, rel=0.02)
    for name, count in whole.bytes_moved.items():
        assert sampled.bytes_moved[name] == pytest.approx(count, rel=0.01)
    for name, seconds in whole.busy_seconds.items():
        assert sampled.busy_seconds[name] == pytest.approx(seconds, rel=0.02)

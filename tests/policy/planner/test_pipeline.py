"""Pipelines against numbers that are derived by hand, and against a replay of everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexgen_helm.errors import OutOfSpace, PolicyError
from flexgen_helm.machine.profile import MachineProfile, Rate
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.pipeline.divided import Stages, even_ranges
from flexgen_helm.policy.planner.pipeline.network import NO_NETWORK, Network, parse_network
from flexgen_helm.policy.planner.pipeline.predict import PipelinePrediction, simulate_pipeline
from flexgen_helm.policy.planner.pipeline.walk import ANSWER_BYTES
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.types import ON_DEVICE, TIERS, ResolvedPolicy, Shares
from tests.policy.planner.made import MIB, machine_with, policy_with, shapes_with
from tests.policy.planner.test_simulate import HEAD, LAYER, RECORD, ROW, large_machine, ragged

ROW_BYTES = 32 * 32 * 2
"""A row of 32 tokens of 32 elements in 16 bits."""
EXACTLY = pytest.mark.parametrize("exactly", [True, False])


def stages_of(
    shapes: ModelShapes,
    policy: ResolvedPolicy,
    machine: MachineProfile,
    *,
    lengths: tuple[int, ...],
    lanes: int,
    available: int = 2**30,
) -> Stages:
    space = Space(dict.fromkeys(TIERS, available), machine.own_memory)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    ranges = [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return Stages.of(shapes, policy, (machine, space), ranges, lanes=lanes)


def scored(
    lengths: tuple[int, ...],
    *,
    lanes: int,
    rows: int = 1,
    jobs: int = 12,
    network: Network = NO_NETWORK,
    exactly: bool = True,
    **fields: Any,
) -> PipelinePrediction:
    """Prompts of 32 tokens that are scored, so many rows of one in each sweep, on a machine without a memory of its own."""
    machine = machine_with(own_memory=False, **fields)
    policy = policy_with(block_tokens=32 * rows, weights=ON_DEVICE)
    stages = stages_of(shapes_with(sum(lengths)), policy, machine, lengths=lengths, lanes=lanes)
    return simulate_pipeline(stages, Workload.uniform(jobs, 32, 0, score=True), network, exactly=exactly)


@EXACTLY
def test_equal_stages_without_a_network_are_as_many_times_faster(exactly: bool) -> None:
    """Stages work at the same time but in the first and last sweeps; the last one has the head too."""
    one = scored((6,), lanes=1, exactly=exactly)
    assert one.seconds == pytest.approx(12 * (RECORD + 6 * ROW + 2 * HEAD), rel=1e-9)
    three = scored((2, 2, 2), lanes=3, exactly=exactly)
    slowest = RECORD + 2 * ROW + 2 * HEAD
    # Rows of the later stages are recorded before their hidden states come.
    assert three.seconds == pytest.approx(RECORD + 2 * ROW + 2 * ROW + 2 * ROW + 2 * HEAD + 11 * slowest, rel=1e-9)
    assert three.sweeps == one.sweeps == 12
    assert three.slowest == 2
    assert three.binding == "stage 2 device"
    assert three.utilisation[2] == pytest.approx(12 * slowest / three.seconds, rel=1e-9)
    assert three.utilisation[0] == pytest.approx(12 * (RECORD + 2 * ROW) / three.seconds, rel=1e-9)


@EXACTLY
def test_one_lane_over_a_slow_network_takes_the_sum_of_stages_and_latencies(exactly: bool) -> None:
    network = Network(rate=1e5, latency=7.0)
    found = scored((2, 1, 3), lanes=1, jobs=5, network=network, exactly=exactly)
    answers = 31 * ANSWER_BYTES
    sweep = RECORD + 6 * ROW + 2 * HEAD + 3 * 7.0 + (2 * ROW_BYTES + answers) / 1e5
    assert found.seconds == pytest.approx(5 * sweep, rel=1e-9)
    assert found.latency_seconds == pytest.approx(sweep, rel=1e-9)
    assert [stage.bytes_sent for stage in found.stages] == [5 * ROW_BYTES, 5 * ROW_BYTES, 5 * answers]
    assert found.without_latency == pytest.approx(5 * (sweep - 21), rel=1e-9)
    assert found.binding == "network latency"


@EXACTLY
def test_rows_travel_while_the_next_is_computed(exactly: bool) -> None:
    """Four rows in one sweep: the second stage is three rows behind the first one's last layer at its end."""
    found = scored((2, 2), lanes=1, rows=4, jobs=4, exactly=exactly)
    # Stage 0: 4 records, 8 calls. Stage 1 begins its first layer when row 0 has left the last layer, 3 calls before the end.
    assert found.seconds == pytest.approx(4 * RECORD + 8 * ROW - 3 * ROW + 8 * ROW + 8 * HEAD, rel=1e-9)
    slow = Network(rate=ROW_BYTES / (3 * ROW), latency=0.0)  # a row takes as long as three calls
    found = scored((2, 2), lanes=1, rows=4, jobs=4, network=slow, exactly=exactly)
    arrives = 4 * RECORD + 5 * ROW + 4 * 3 * ROW  # the last row, whose transfer waits for those before
    answers = 4 * 31 * ANSWER_BYTES / slow.rate
    assert found.seconds == pytest.approx(arrives + ROW + 4 * ROW + 8 * HEAD + answers, rel=1e-9)
    assert found.binding == "network rate"


@EXACTLY
def test_more_lanes_hide_latency(exactly: bool) -> None:
    network = Network(latency=0.1)
    found = {lanes: scored((2, 2), lanes=lanes, jobs=24, network=network, exactly=exactly) for lanes in (1, 2, 8)}
    assert found[1].seconds == pytest.approx(24 * (RECORD + 4 * ROW + 2 * HEAD + 0.2), rel=1e-9)
    # With two lanes a round of both takes as long as one sweep of a lane, as the network binds.
    assert found[2].seconds == pytest.approx(found[1].seconds / 2, rel=0.02)
    slowest = RECORD + 2 * ROW + 2 * HEAD
    assert 24 * slowest < found[8].seconds < 24 * slowest + 0.2 + 3 * ROW
    assert (found[1].binding, found[2].binding) == ("network latency", "network latency")


@EXACTLY
@pytest.mark.parametrize("own_memory", [True, False])
def test_bound_by_weights_a_stage_reads_its_own_only(own_memory: bool, exactly: bool) -> None:
    machine = machine_with(own_memory=own_memory, disk_read=Rate(1e5))
    policy = policy_with(block_tokens=32, weights=(0.0, 0.0, 1.0))
    stages = stages_of(shapes_with(8), policy, machine, lengths=(4, 4), lanes=2)
    found = simulate_pipeline(stages, Workload.uniform(20, 32, 0, score=True), NO_NETWORK, exactly=exactly)
    reading = 4 * LAYER / 1e5
    # 20 sweeps on each stage, and one stage's share of a sweep until the other one has rows.
    assert 20 * reading < found.seconds < 21.1 * reading
    assert found.binding.endswith("disk_read")
    assert all(stage.bytes_moved["disk_read"] == pytest.approx(20 * 4 * LAYER, rel=0.06) for stage in found.stages)


IN_RAM = (True, (0.5, 0.5, 0.0), (0.0, 1.0, 0.0), 1.0)
ON_THREE_TIERS = (True, (0.0, 0.3, 0.7), (0.2, 0.4, 0.4), 0.0)
CACHE_ON_DISK = (False, (0.0, 0.7, 0.3), (0.5, 0.0, 0.5), 0.0)
RESIDENT = (False, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0), 0.0)
WORKLOADS = {"uniform": Workload.uniform(40, 200, 24), "ragged": ragged(36)}
NETWORKS = {"fast": (3, Network(1.25e8, 0.01)), "slow": (1, Network(1.25e7, 0.1)), "none": (3, NO_NETWORK)}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("placement", [IN_RAM, ON_THREE_TIERS, CACHE_ON_DISK, RESIDENT])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_samples_are_close_to_the_replay_of_everything(
    workload: str, placement: tuple[bool, Shares, Shares, float], network: str
) -> None:
    sampled, whole = both(WORKLOADS[workload], placement, *NETWORKS[network])
    assert sampled.seconds == pytest.approx(whole.seconds, rel=0.05)


def test_a_sample_is_close_to_the_replay_of_everything() -> None:
    sampled, whole = both(Workload.uniform(12, 200, 6), (True, (0.0, 1.0, 0.0), ON_DEVICE, 0.0), 2, Network(1.25e8, 0.01))
    assert sampled.seconds == pytest.approx(whole.seconds, rel=0.05)
    assert (sampled.sweeps, sampled.prompt_tokens) == (whole.sweeps, whole.prompt_tokens)
    assert [a.bytes_sent for a in sampled.stages] == [b.bytes_sent for b in whole.stages]


def both(
    workload: Workload, placed: tuple[bool, Shares, Shares, float], lanes: int, network: Network
) -> tuple[PipelinePrediction, PipelinePrediction]:
    own_memory, weights, cache, cpu = placed
    shapes = shapes_with(16, layer=60 * MIB, head=40 * MIB, hidden_size=2048, num_heads=16, num_kv_heads=16, head_dim=128)
    policy = policy_with(gpu_batch_tokens=256, num_gpu_batches=3, block_tokens=1024, cache=cache, cpu_attention=cpu)
    machine = large_machine(own_memory=own_memory)
    stages = stages_of(shapes, replace(policy, weights=weights), machine, lengths=(6, 5, 5), lanes=lanes, available=40 * 2**30)
    sampled, whole = (simulate_pipeline(stages, workload, network, exactly=exactly) for exactly in (False, True))
    return sampled, whole


@EXACTLY
@pytest.mark.parametrize("weights", [ON_DEVICE, (0.0, 1.0, 0.0)])
def test_one_stage_is_a_machine_alone(weights: Shares, exactly: bool) -> None:
    machine, shapes = machine_with(), shapes_with(5)
    policy = policy_with(weights=weights)
    stages = stages_of(shapes, policy, machine, lengths=(5,), lanes=1)
    workload = Workload.uniform(6, 40, 4)
    found = simulate_pipeline(stages, workload, Network(1.0, 9.0), exactly=exactly)
    alone = simulate(MemoryPlan.of(shapes, policy, stages.plans[0].space), workload, machine, exactly=exactly)
    assert found.seconds == pytest.approx(alone.seconds, rel=1e-9)
    assert found.latency_seconds == pytest.approx(alone.latency_seconds, rel=1e-9)
    assert found.stages[0].peak_bytes == alone.peak_bytes


def test_lanes_divide_the_cache_and_the_stage_with_least_room_decides() -> None:
    machine = machine_with()
    shapes = shapes_with(6, layer=64 * 1024, num_kv_heads=64, head_dim=128)
    policy = policy_with(weights=ON_DEVICE)
    one, two = (stages_of(shapes, policy, machine, lengths=(2, 4), lanes=lanes, available=200 * MIB) for lanes in (1, 2))
    for lanes, stages in ((1, one), (2, two)):
        longer = stages.plans[1]
        room = longer.cache.capacities(longer.left(longer.space.available))["device"]
        assert stages.capacity.cache_bytes["device"] == pytest.approx(room * 2 / 4 / lanes, rel=1e-6)
    # Rows of another lane's sweep take room: 96 and 32 tokens of 32 elements in 16 bits, each with a byte.
    assert two.plans[1].travel_bytes - one.plans[1].travel_bytes == (96 + 32) * 65


def test_a_prompt_that_fits_no_lane_is_an_error() -> None:
    shapes = shapes_with(4, num_kv_heads=64, head_dim=128)
    stages = stages_of(shapes, policy_with(), machine_with(), lengths=(2, 2), lanes=8, available=80 * MIB)
    with pytest.raises(OutOfSpace, match="do not fit into the cache"):
        simulate_pipeline(stages, Workload.uniform(8, 1500, 8), NO_NETWORK)


def test_the_stage_that_does_not_fit_is_named() -> None:
    shapes = shapes_with(4, layer=8 * MIB)
    with pytest.raises(PolicyError, match=r"Stage 1 of 2 \(layers 1 to 3\): "):
        stages_of(shapes, policy_with(weights=ON_DEVICE), machine_with(), lengths=(1, 3), lanes=2, available=40 * MIB)


def test_ranges_without_a_profile_count_the_head() -> None:
    shapes = shapes_with(10, vocab_size=8192)  # a tied head of 8 layers' products, for a quarter of the time
    assert [len(layers) for layers in even_ranges(shapes, 2)] == [6, 4]
    assert [len(layers) for layers in even_ranges(shapes, 3)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("text", "rate", "latency"),
    [("1Gbit/s,10ms", 1.25e8, 0.01), (" 100 mbit/s , 0.1 s", 1.25e7, 0.1), ("125MB/s,0us", 1.25e8, 0.0)],
)
def test_networks_are_read(text: str, rate: float, latency: float) -> None:
    network = parse_network(text)
    assert [network.rate, network.latency] == pytest.approx([rate, latency])
    assert parse_network(str(network)) == network


@pytest.mark.parametrize("text", ["", "1Gbit/s", "10ms,1Gbit/s", "1 Gbit, 3 ms", "0Gbit/s,1ms", "1Gbit/s,1ms,2ms"])
def test_a_network_that_cannot_be_read(text: str) -> None:
    with pytest.raises(PolicyError, match=r"Give its rate and its latency, such as 1Gbit/s,10ms"):
        parse_network(text)

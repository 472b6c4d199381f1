"""Seconds of layers and head, by which stages are balanced: they add up to a run, and follow what binds."""

from __future__ import annotations

import pytest

from flexgen_helm.machine.profile import Rate
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.durations import Durations
from flexgen_helm.policy.planner.pipeline.divided import even_ranges
from flexgen_helm.policy.planner.pipeline.unit_costs import GEN_LEN, PROMPT_LEN, measured_ranges, unit_seconds
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.sweeps import sweep_loads
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.types import ON_DEVICE, TIERS
from tests.policy.planner.made import KIB, machine_with, policy_with, shapes_with

SPACE = Space(dict.fromkeys(TIERS, 2**30), own_memory=False)
MACHINE = machine_with(own_memory=False, disk_read=Rate(1e6))


def test_units_add_up_to_what_the_device_does_in_a_run() -> None:
    shapes, policy = shapes_with(5, layer_products={2: 64 * KIB}), policy_with(weights=ON_DEVICE)
    plan = MemoryPlan.of(shapes, policy, SPACE)
    workload = Workload.uniform(policy.block_size, PROMPT_LEN, GEN_LEN)
    loads, durations = list(sweep_loads(plan, workload, alike=1)), Durations(plan, MACHINE)
    recording = sum(stage.seconds for load in loads for row in load.rows for stage in durations.record(row))
    found = unit_seconds(shapes, plan, MACHINE)
    busy = simulate(plan, workload, MACHINE, exactly=True).busy_seconds["device"]
    assert sum(found.layers) + found.head == pytest.approx(busy - recording, rel=0.01)
    assert found.layers[2] > 1.5 * found.layers[0] == pytest.approx(1.5 * found.layers[4])


def test_where_weights_come_from_a_slow_disk_layers_take_as_long_as_their_reading() -> None:
    shapes, policy = shapes_with(6), policy_with(weights=(0.0, 0.0, 1.0))
    part = MemoryPlan.of(shapes.of_layers(range(3)), policy, SPACE)
    slow = machine_with(own_memory=False, disk_read=Rate(1e3))
    found = unit_seconds(shapes, part, slow)
    workload = Workload.uniform(policy.block_size, PROMPT_LEN, GEN_LEN)
    sweeps = sum(load.count for load in sweep_loads(part, workload))
    assert found.layers == pytest.approx([sweeps * 64 * KIB / 1e3] * 6)
    assert found.head < found.layers[0]


def test_a_head_counts_only_for_tokens_that_need_logits() -> None:
    """A head as large as four layers takes no more than one: most tokens of a typical job are read only."""
    shapes = shapes_with(10, vocab_size=4 * 1024)
    policy = policy_with(weights=ON_DEVICE)
    found = unit_seconds(shapes, MemoryPlan.of(shapes, policy, SPACE), MACHINE)
    assert 0 < found.head < found.layers[0]
    assert [len(each) for each in measured_ranges(shapes, policy, (MACHINE, SPACE), 2)] == [5, 5]
    # Without a profile it counts as one layer: 6 and 4 + 1, or 5 and 5 + 1.
    assert [len(each) for each in even_ranges(shapes, 2)] == [6, 4]

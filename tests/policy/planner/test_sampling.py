"""A run from a few sweeps of each kind, beside the simulation of all sweeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.candidate import candidate_of
from flexgen_helm.policy.planner.search.choose import Problem
from flexgen_helm.policy.planner.search.features import STEP_PARTS, Features
from flexgen_helm.policy.planner.search.sampling import sampled
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.types import Policy
from tests.policy.planner.made import cpu, model, space_of, t4
from tests.policy.planner.test_simulate import ragged

SMALL, GROUPED = model(24, 2048, 16), model(12, 4096, 32, kv_heads=8)
SIZES = (
    Policy(gpu_batch_size=16, gpu_batch_tokens=256, num_gpu_batches=2, block_tokens=1024),
    Policy(gpu_batch_size=32, gpu_batch_tokens=1024, num_gpu_batches=3, block_tokens=4096),
)
WORKLOADS = {
    "new": Workload.uniform(96, 192, 32),
    "score": Workload.uniform(64, 256, 0, score=True),
    "long": Workload.uniform(96, 512, 24),
    "short": Workload.uniform(96, 40, 48),
    "shared": Workload.uniform(96, 300, 16, shared_prefix=200),
    "ragged": ragged(60),
}
MACHINES = {"gpu": t4(2, 40, 100), "cpu": cpu(2.5), "resident": t4(14, 40, 100)}
CLOSE = 0.04
"""A replay of the levels between those that are replayed would say something else by so much at most."""


def both(
    shapes: ModelShapes, asked: Policy, workload: Workload, profile: MachineProfile
) -> tuple[Prediction, Prediction, MemoryPlan]:
    problem = Problem.of(shapes, workload, profile, space_of(profile), asked=asked)
    plan = MemoryPlan.of(shapes, problem.base, problem.space)
    live = min(plan.policy.block_size, len(workload.prompts))
    found = sampled(problem.model, replace(candidate_of(plan.policy), live=live), plan)
    return found, simulate(plan, workload, profile), plan


def assert_close(found: Prediction, whole: Prediction, workload: Workload) -> None:
    """Of completions that take other numbers of steps, each takes that of its part; so sweeps may be as many off as that."""
    features = Features.of(workload)
    off = (features.longest - features.shortest) / STEP_PARTS / whole.sweeps
    assert found.seconds == pytest.approx(whole.seconds, rel=CLOSE + off)
    assert found.sweeps == pytest.approx(whole.sweeps, abs=1 + off * whole.sweeps)


@pytest.mark.parametrize("workload", ["new", "score"])
@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_time_bytes_and_peaks_are_those_of_all_sweeps(profile: str, workload: str) -> None:
    found, whole, _ = both(SMALL, SIZES[0], WORKLOADS[workload], MACHINES[profile])
    assert_close(found, whole, WORKLOADS[workload])
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.1)
    for name, count in whole.bytes_moved.items():
        assert found.bytes_moved[name] == pytest.approx(count, rel=0.1)


@pytest.mark.parametrize(
    ("shapes", "size", "profile", "workload"),
    [
        (GROUPED, 1, "resident", "shared"),  # the mean sweep: 14 % too long
        (GROUPED, 0, "cpu", "short"),  # prompts wait for their row: 13 %
        (GROUPED, 1, "gpu", "ragged"),  # with the mean number of steps: 40 % too short
        (SMALL, 1, "gpu", "long"),  # with half of a chunk read: 8 % less attention on the CPU
    ],
)
def test_blocks_that_fill_and_drain_take_the_time_of_all_their_sweeps(
    shapes: ModelShapes, size: int, profile: str, workload: str
) -> None:
    found, whole, _ = both(shapes, SIZES[size], WORKLOADS[workload], MACHINES[profile])
    assert_close(found, whole, WORKLOADS[workload])
    if workload == "long":
        assert found.busy_seconds["cpu_attention"] == pytest.approx(whole.busy_seconds["cpu_attention"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("profile", MACHINES)
@pytest.mark.parametrize("asked", SIZES)
@pytest.mark.parametrize("shapes", [SMALL, GROUPED])
def test_all_sweeps_in_many_cells(shapes: ModelShapes, asked: Policy, profile: str, workload: str) -> None:
    found, whole, _ = both(shapes, asked, WORKLOADS[workload], MACHINES[profile])
    assert_close(found, whole, WORKLOADS[workload])


def test_the_first_answer_comes_as_late_as_with_all_sweeps() -> None:
    """Sweeps before it are those in which the block fills, which are not the mean ones."""
    found, whole, _ = both(SMALL, SIZES[1], WORKLOADS["long"], MACHINES["gpu"])
    assert found.latency_seconds == pytest.approx(whole.latency_seconds, rel=0.05)

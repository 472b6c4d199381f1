"""A run from one sweep of each kind, beside the simulation of all sweeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.search.candidate import candidate_of
from flexgen_helm.policy.planner.search.choose import Problem
from flexgen_helm.policy.planner.search.sampling import sampled
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.types import Policy
from tests.policy.planner.made import cpu, model, space_of, t4

SHAPES = model(24, 2048, 16)
WORKLOADS = {"new": Workload.uniform(96, 192, 32), "score": Workload.uniform(64, 256, 0, score=True)}


@pytest.mark.parametrize(
    "workload", [Workload.uniform(96, 192, 32), Workload.uniform(64, 256, 0, score=True)], ids=["new", "score"]
)
@pytest.mark.parametrize("profile", [t4(2, 40, 100), cpu(2.5)], ids=["gpu", "cpu"])
def test_time_bytes_and_peaks_are_those_of_all_sweeps(profile: MachineProfile, workload: Workload) -> None:
    asked = Policy(gpu_batch_size=16, gpu_batch_tokens=256, num_gpu_batches=2, block_tokens=1024)
    problem = Problem.of(SHAPES, workload, profile, space_of(profile), asked=asked)
    plan = MemoryPlan.of(SHAPES, problem.base, problem.space)
    live = min(plan.policy.block_size, len(workload.prompts))
    found = sampled(problem.model, replace(candidate_of(plan.policy), live=live), plan)
    whole = simulate(plan, workload, profile)
    assert found.seconds == pytest.approx(whole.seconds, rel=0.05)
    assert found.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.1)
    for name, count in whole.bytes_moved.items():
        assert found.bytes_moved[name] == pytest.approx(count, rel=0.1)

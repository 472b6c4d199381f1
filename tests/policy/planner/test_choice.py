"""The policy that a search names makes the plan that it predicted, also where the embedding table is the head's matrix."""

from __future__ import annotations

import torch

from flexgen_helm.machine.profile_file import named_profile
from flexgen_helm.memory.device import Device
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.search.choose import Problem, choose_policy
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.runtime.planning.command import planned_shapes, space_of
from flexgen_helm.runtime.planning.sources import open_source


def test_the_policy_makes_the_plan_that_was_predicted() -> None:
    machine = named_profile("t4")
    source = open_source("facebook/opt-6.7b", "auto", Device(torch.device("cuda"), True))
    shapes, space = planned_shapes(source, None), space_of(machine, {"device": 8 * 2**30})
    choice = choose_policy(Problem.of(shapes, Workload.uniform(32, 64, 64), machine, space))
    assert choice.default is not None
    assert choice.prediction.seconds < choice.default.seconds
    assert MemoryPlan.of(shapes, choice.policy, space).weights.shares == choice.prediction.policy.weights

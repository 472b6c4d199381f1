"""The simulator moves as many bytes over each link as the engine does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_helm import Engine, Job
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload
from flexgen_helm.run_stats import RunStats
from flexgen_helm.types import LINKS, ResolvedPolicy
from tests.jobs import random_tokens
from tests.policy.planner.made import machine_with
from tests.workbench import OWN_MEMORY, Workbench

SHARED = random_tokens(7, 40)
"""Beginning of half of the prompts: not whole pages."""


def asked() -> tuple[list[Job], Workload]:
    """The same work as jobs and as the planner sees it: some is only scored, some begins alike."""
    jobs, prompts = [], []
    for i in range(24):
        tokens = [*(SHARED if i % 2 else ()), *random_tokens(100 + i, 5 + 7 * i % 50)]
        new, score = (0, True) if i % 5 == 0 else (2 + i % 9, False)
        jobs.append(Job(token_ids=tokens, max_new_tokens=new, score_prompt=score, ignore_eos=True))
        prompts.append(PlannedPrompt(tuple(tokens), (new,) if new else (), score))
    return jobs, Workload(tuple(prompts))


def both(folder: Path, disk: Path, device: Device, **fields: Any) -> tuple[dict[str, int], RunStats, Any]:
    """Returns the bytes that are predicted, what the engine measures, and its plan. Nothing overlaps: every transfer ends."""
    sizes = {"gpu_batch_size": 16, "num_gpu_batches": 1, "gpu_batch_tokens": 32, "block_tokens": 96, "overlap": False}
    policy = ResolvedPolicy(**sizes | {"cpu_attention": 0.0} | fields)
    jobs, workload = asked()
    with Engine.from_pretrained(str(folder), device=device, policy=policy, offload_folder=disk, rows="packed") as engine:
        engine.run(jobs)
        plan, stats = engine._parts.plan, engine.stats
    found = simulate(plan, workload, float_machine(device), exactly=True)
    assert found.sweeps == stats.sweeps
    assert (found.prompt_tokens, found.generated_tokens) == (stats.prompt_tokens_computed, stats.generated_tokens)
    return dict(found.bytes_moved), stats, plan


def float_machine(device: Device) -> MachineProfile:
    """A machine that knows float32 and what is made of it."""
    machine = machine_with(own_memory=device.own_memory)
    formats = ("float32", "kv4", "kv4s10")
    attention = tuple(rate for r in machine.attention for rate in (r, *(replace(r, format=name) for name in formats)))
    products = tuple(replace(r, dtype="float32") for r in machine.products)
    return replace(machine, attention=attention, products=products)


PLACEMENTS: list[tuple[Device, dict[str, Any]]] = [
    (CPU, {"cache": (0.5, 0.0, 0.5)}),
    (CPU, {"cache": (0.0, 0.0, 1.0), "hidden": (0.3, 0.3, 0.4)}),
    (OWN_MEMORY, {"cache": (0.0, 1.0, 0.0)}),
    (OWN_MEMORY, {"cache": (0.0, 1.0, 0.0), "cpu_attention": 1.0}),
    (OWN_MEMORY, {"cache": (0.3, 0.3, 0.4), "hidden": (0.0, 0.5, 0.5)}),
]


@pytest.mark.parametrize(("device", "fields"), PLACEMENTS)
def test_cache_and_hidden_states_move_as_many_bytes(
    workbench: Workbench, tmp_path: Path, device: Device, fields: dict[str, Any]
) -> None:
    predicted, stats, _ = both(workbench.folder("llama"), tmp_path, device, weights=(1.0, 0.0, 0.0), **fields)
    assert predicted == stats.bytes_moved
    assert predicted.keys() & LINKS


def test_of_v_the_chosen_rows_are_counted(workbench: Workbench, tmp_path: Path) -> None:
    """Prompts over several chunks, two query heads to one of K and V: between a tenth and a fifth of V in sealed pages."""
    policy = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=64, num_gpu_batches=1, cache=(0, 1, 0), cpu_attention=0.0)
    jobs = [Job(token_ids=random_tokens(i, 400), max_new_tokens=16, ignore_eos=True) for i in range(2)]
    workload = Workload.uniform(2, 400, 16)
    found = {}
    for variant in ("kv4", "kv4s10"):
        options: dict[str, Any] = {"device": OWN_MEMORY, "policy": policy, "offload_folder": tmp_path, "compression": variant}
        with Engine.from_pretrained(str(workbench.folder("llama")), **options) as engine:
            engine.run(jobs)
            plan, measured = engine._parts.plan, engine.stats.bytes_moved["host_to_device"]
        predicted = simulate(plan, workload, float_machine(OWN_MEMORY), exactly=True).bytes_moved["host_to_device"]
        found[variant] = predicted
        assert predicted == pytest.approx(measured, rel=0.1)
    assert found["kv4s10"] < 0.8 * found["kv4"]


@pytest.mark.parametrize(
    ("device", "fields"), [(CPU, {"weights": (0.3, 0.0, 0.7)}), (OWN_MEMORY, {"weights": (0.2, 0.4, 0.4)})]
)
def test_weights_move_as_many_bytes_but_for_those_of_the_next_sweep(
    workbench: Workbench, tmp_path: Path, device: Device, fields: dict[str, Any]
) -> None:
    predicted, stats, plan = both(workbench.folder("llama"), tmp_path, device, **fields)
    ahead = 2 * plan.weights.num_slots * max(plan.shapes.stored_bytes[j] for j in plan.weights.streamed)
    assert predicted.keys() == stats.bytes_moved.keys()
    for name, count in stats.bytes_moved.items():
        assert abs(predicted[name] - count) <= ahead


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    torch.manual_seed(0)
    return Workbench(tmp_path_factory.mktemp("models"), num_layers=4)

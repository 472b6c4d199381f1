"""The simulator's K and V take as many bytes on each tier as those of an engine that does the same work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_helm import Engine, Job
from flexgen_helm.kv_cache import staging
from flexgen_helm.kv_cache.pages import TRANSFER_BYTES
from flexgen_helm.kv_cache.staging import StagingBuffer
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.sweeps import sweep_loads
from flexgen_helm.types import ResolvedPolicy, Shares, Tier
from tests.jobs import random_tokens
from tests.models import save_tiny
from tests.policy.planner.test_bytes import asked
from tests.workbench import OWN_MEMORY


@pytest.mark.parametrize(
    ("device", "cache"), [(CPU, (1.0, 0.0, 0.0)), (OWN_MEMORY, (1.0, 0.0, 0.0)), (OWN_MEMORY, (0.5, 0.5, 0.0))]
)
def test_cache_takes_the_bytes_that_the_engine_holds(device: Device, cache: Shares, tmp_path: Path) -> None:
    jobs, workload = asked()
    policy = ResolvedPolicy(
        gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=32, block_tokens=96, cache=cache, cpu_attention=0.0
    )
    folder = save_tiny("llama", tmp_path)
    with Engine.from_pretrained(str(folder), device=device, policy=policy, rows="packed") as engine:
        engine.run(jobs)
        plan, measured = engine._parts.plan, engine.stats.tier_peak_bytes
    loads = list(sweep_loads(plan, workload))
    tiers: tuple[Tier, ...] = ("device", "host") if not cache[1] else ("host",)
    for tier in tiers:  # beside pages on the host, those of the rows at hand are on the device
        held = max(load.cache_bytes[tier] for load in loads)
        assert measured.get(tier, 0) == plan.weights.resident_bytes[tier] + held


@pytest.mark.parametrize(("variant", "cache"), [("", (0.0, 0.5, 0.5)), ("kv4", (0.0, 1.0, 0.0)), ("kv4s10", (0.0, 0.0, 1.0))])
def test_buffers_take_the_bytes_that_are_planned(
    variant: str, cache: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[StagingBuffer] = []

    class Noted(StagingBuffer):
        def __init__(self, num_bytes: int, device: Device) -> None:
            super().__init__(num_bytes, device)
            made.append(self)

    monkeypatch.setattr(staging, "StagingBuffer", Noted)
    policy = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=64, cache=cache, cpu_attention=0.0)
    options: dict[str, Any] = {"compression": variant} if variant else {}
    folder = str(save_tiny("llama", tmp_path))
    with Engine.from_pretrained(folder, device=OWN_MEMORY, policy=policy, offload_folder=tmp_path, **options) as engine:
        engine.run([Job(token_ids=random_tokens(1, 200), max_new_tokens=3, ignore_eos=True)])
        planned = engine._parts.plan.cache.buffer_bytes
    assert sum(len(buffer.twin) for buffer in made) == planned["device"] > 0
    rows_from_disk = TRANSFER_BYTES if variant == "kv4s10" else 0
    assert sum(len(buffer.host) for buffer in made) + rows_from_disk == planned["host"]


def test_a_peak_grows_with_the_cache(tmp_path: Path) -> None:
    """By the bytes beyond those of the smallest cache, which every plan counts."""
    policy = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=32, cache=(0.5, 0.5, 0.0), cpu_attention=0.0)
    with Engine.from_pretrained(str(save_tiny("llama", tmp_path)), device=OWN_MEMORY, policy=policy, rows="packed") as engine:
        plan = engine._parts.plan
    least, more = plan.cache.least_bytes, 2**30
    found = plan.peak_with({"device": least["device"] + more, "host": least["host"] - 1})
    assert found["device"] - plan.peak_bytes["device"] == more - max(0, plan.peak_bytes["device"] - _running(plan))
    assert found["host"] == plan.peak_bytes["host"]


def _running(plan: MemoryPlan) -> int:
    """Return the bytes of the device while jobs are computed, where loading may have taken more."""
    return plan.weights.needed_bytes["device"] + plan.working_bytes + plan.cache.least_bytes["device"]

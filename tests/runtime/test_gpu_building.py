"""What an engine does for a GPU while it is made and closed, on the simulated one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from flexgen_helm import Engine, Job, Policy
from flexgen_helm.memory.workspaces import make_workspaces
from flexgen_helm.policy import cache_plan
from flexgen_helm.runtime import building
from flexgen_helm.runtime.free_space import free_space
from flexgen_helm.types import ON_DEVICE, ON_HOST, Shares
from tests.jobs import random_tokens
from tests.models import save_tiny
from tests.simulated_gpu.gpu import SimulatedGpu
from tests.simulated_gpu.patches import simulated_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="only a simulated GPU tells what it was asked")
POLICY = Policy(gpu_batch_size=16, num_gpu_batches=2, gpu_batch_tokens=64)
MIB = 2**20
STREAMED = {"max_memory": {"device": int(97.5 * MIB)}}
"""Too little for all layers of the model, if buffers of pages are left out, which take more."""


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as gpu:
        yield gpu


@pytest.fixture
def load(gpu: SimulatedGpu, tmp_path: Path) -> Callable[..., Engine]:
    """Makes an engine of a tiny model, whose weights take 0.6 MiB; attention may gather 96."""
    folder = str(save_tiny("llama", tmp_path, num_layers=12))

    def make(**options: Any) -> Engine:
        return Engine.from_pretrained(folder, dtype="bfloat16", device="cuda", policy=POLICY, **options)

    return make


def test_torch_is_limited_as_long_as_the_engine_lives(gpu: SimulatedGpu, load: Callable[..., Engine]) -> None:
    limit = 120 * MIB
    with load(max_memory={"device": limit}) as engine:
        assert gpu.allocator.allowed == pytest.approx(limit, abs=1)
        engine.run([Job(token_ids=random_tokens(3, 40), max_new_tokens=2)])
        assert engine.stats.peak_bytes == gpu.allocator.most_reserved <= limit
    assert gpu.allocator.allowed == gpu.allocator.total


def test_checks_and_worker_run_on_the_engines_gpu(load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a current GPU of its own, on which libraries launch their kernels."""
    entered: list[tuple[str, torch.device]] = []

    def enter(device: torch.device) -> nullcontext[None]:
        entered.append((threading.current_thread().name, device))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", enter)
    load().close()
    gpu = torch.device("cuda", 0)
    assert {(threading.current_thread().name, gpu), ("flexgen-helm", gpu)} <= set(entered)


@pytest.mark.parametrize(("options", "place", "cache"), [(STREAMED, "host", ON_HOST), ({}, "device", ON_DEVICE)])
def test_the_place_of_attention_is_chosen(
    options: dict[str, Any], place: str, cache: Shares, load: Callable[..., Engine]
) -> None:
    with patch.object(cache_plan, "TRANSFER_BYTES", 0), load(**options) as engine:
        assert (engine.numerics.machine.attention, engine.policy.cache) == (place, cache)
        assert engine.policy.cpu_attention == (place == "host")


def test_workspaces_are_taken_before_the_room_for_k_and_v_is_measured(load: Callable[..., Engine]) -> None:
    """What is patched changes nothing, so that the verdict of another test's self-check may be used (no monkeypatch)."""
    order: list[str] = []

    def noting(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            order.append(name)
            return own(*arguments)

        return call

    workspaces, space = noting("workspaces", make_workspaces), noting("space", free_space)
    with patch.multiple(building, make_workspaces=workspaces, free_space=space):
        load().close()
    assert order == ["workspaces", "space"]


def test_memory_of_the_checks_is_given_back(gpu: SimulatedGpu, load: Callable[..., Engine]) -> None:
    with load():
        gpu.settle()
        reserved = gpu.allocator.reserved
        gpu.allocator.empty_cache()
        assert gpu.allocator.reserved == reserved


def test_no_more_pages_are_made_than_a_block_can_use(load: Callable[..., Engine]) -> None:
    """They are made at once, and this GPU has 80 GiB."""
    with load() as engine:
        info, bytes_per_token = engine.describe(), engine._parts.plan.shapes.cache_bytes_per_token
        assert info.cache_bytes == {"device": engine.policy.block_size * 640 * bytes_per_token, "host": 0, "disk": 0}

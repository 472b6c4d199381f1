"""The simulated GPU sees faults: each test takes one guard out of the package's code, and a run must show it.

That it shows none with all guards in the same placement is told by `tests.simulated_gpu.test_placements`.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.attention import row
from flexgen_helm.attention.row import RowAttention
from flexgen_helm.errors import FlexGenError
from flexgen_helm.kv_cache.staging import StagingBuffer
from flexgen_helm.kv_cache.working_set import WorkingSet
from flexgen_helm.memory import hidden_store
from flexgen_helm.memory.hidden_store import HiddenStore
from flexgen_helm.memory.link import Link, Started
from flexgen_helm.memory.weight_store import WeightStore
from flexgen_helm.model import embeddings
from tests.simulated_gpu.engines import MIXED, ON_HOST, POLICY, answers
from tests.simulated_gpu.gpu import SimulatedGpu
from tests.simulated_gpu.patches import simulated_gpu

pytestmark = pytest.mark.usefixtures("one_check")


class Arrived:
    """A transfer that nobody has to wait for."""

    def wait(self) -> None:
        pass


class Planter:
    """Changes lines of the package's functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def plant(self, owner: Any, name: str, old: str, new: str) -> None:
        """Put ``new`` in the place of ``old``, which occurs once in the function ``name`` of a class or module."""
        function = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(old) == 1, f"{name} has changed: plant the fault anew"
        names = {**function.__globals__, "Arrived": Arrived}
        exec(compile(source.replace(old, new), inspect.getsourcefile(function) or "", "exec"), names)
        self._monkeypatch.setattr(owner, name, names[name])


@pytest.fixture
def planter(monkeypatch: pytest.MonkeyPatch) -> Planter:
    return Planter(monkeypatch)


@pytest.fixture
def folder(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("llama")


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as gpu:
        yield gpu


def test_the_computation_does_not_wait_for_transfers(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    planter.plant(Started, "wait", "if event is not None:", "if False:")
    answers(folder, MIXED)
    assert gpu.races


def test_transfers_do_not_wait_for_the_computation(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    planter.plant(Link, "_run", "self._stream.wait_event(before)", "pass")
    answers(folder, MIXED)
    assert gpu.races


def test_hidden_states_leave_without_record_stream(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    line = "hidden.record_stream(torch.cuda.current_stream(hidden.device))"
    planter.plant(hidden_store._Host, "write", line, "pass")
    answers(folder, MIXED)
    assert gpu.hazards
    assert not gpu.races


def test_hidden_states_arrive_without_record_stream(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    line = "target[0].record_stream(torch.cuda.current_stream(self._device))"
    planter.plant(HiddenStore, "take", line, "pass")
    answers(folder, MIXED)
    assert gpu.hazards
    assert not gpu.races


def test_staging_buffers_are_used_again_at_once(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    planter.plant(StagingBuffer, "finish", "self._event.synchronize()", "pass")
    answers(folder, MIXED)
    assert gpu.races


def test_read_ahead_buffers_are_used_again_at_once(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    planter.plant(WeightStore, "_fill", "torch.cuda.current_stream(target.device).synchronize()", "pass")
    answers(folder, replace(POLICY, weights=(0, 0, 1)))
    assert gpu.races


def test_slots_of_pages_are_filled_before_they_are_emptied(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    old = "upload(slots, self._device), self._last, slots"
    planter.plant(WorkingSet, "load", old, "upload(slots, self._device), self._last if batches else Arrived(), slots")
    answers(folder, MIXED)
    assert gpu.races


def test_slots_of_weights_are_filled_before_their_last_reader_is_done(
    planter: Planter, gpu: SimulatedGpu, folder: Path
) -> None:
    planter.plant(Link, "submit", "before.record(torch.cuda.current_stream(self._device))", "pass")
    answers(folder, replace(MIXED, weights=(0, 1, 0), cache=(1, 0, 0), hidden=(1, 0, 0)))
    assert gpu.races


def test_outputs_of_the_cpus_attention_stay_there(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    planter.plant(RowAttention, "attend", ".to(qkv[2].dtype), qkv[2].device)", ".to(qkv[2].dtype), HOST)")
    with pytest.raises(FlexGenError, match="same device"):
        answers(folder, ON_HOST)
    assert gpu.mismatches


def test_the_cpu_attends_before_its_queries_are_there(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    planter.plant(row, "to_host", "torch.cuda.current_stream(device).synchronize()", "pass")
    answers(folder, ON_HOST)
    assert gpu.races


def test_ids_for_a_table_on_the_host_stay_on_the_device(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    planter.plant(embeddings, "_to_host", "x.to(CPU) if isinstance(x, Tensor) else x", "x")
    with pytest.raises(RuntimeError, match="same device"):
        answers(folder, replace(MIXED, weights=(0, 1, 0)))
    assert gpu.mismatches


def test_memory_is_freed_and_unpinned_under_a_copy(planter: Planter, gpu: SimulatedGpu, folder: Path) -> None:
    """The next sweep's weights are on their way when the engine closes."""
    planter.plant(Link, "close", "self._stream.synchronize()", "pass")
    answers(folder, replace(MIXED, weights=(0, 1, 0)))
    kinds = {hazard.split(" is ")[0].split(" of ")[0] for hazard in gpu.hazards}
    assert kinds == {"memory", "pinned memory"}

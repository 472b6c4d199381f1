"""What is held back of each tier's free memory, for the process and for attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexgen_helm.attention.chunks import GATHERED_BYTES
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.runtime import free_space as module
from flexgen_helm.runtime.free_space import free_space, measure_space, whole_machine

GIB, MIB = 2**30, 2**20
GPU = Device(torch.device("cuda"))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {GPU.torch_device: 15 * GIB, CPU.torch_device: 100 * GIB}
    monkeypatch.setattr(module, "free_bytes", found.__getitem__)
    monkeypatch.setattr(module, "free_disk_bytes", lambda folder: 500 * GIB)
    monkeypatch.setattr(module, "total_bytes", {GPU.torch_device: 16 * GIB, CPU.torch_device: 128 * GIB}.__getitem__)


def test_kernels_and_libraries_need_more_of_a_gpu_than_of_the_host(tmp_path: Path) -> None:
    ram = 100 * GIB - 128 * MIB
    assert free_space(GPU, tmp_path) == {"device": 15 * GIB - 512 * MIB, "host": ram, "disk": 500 * GIB}
    assert free_space(Device(CPU.torch_device, own_memory=True), tmp_path)["device"] == ram


def test_what_attention_gathers_is_counted_in_16_bits_and_in_fp32(tmp_path: Path) -> None:
    assert measure_space(GPU, {}, tmp_path).scratch_bytes == GATHERED_BYTES * (2 + 4) // 2
    assert measure_space(CPU, {}, tmp_path).scratch_bytes == 0


def test_space_on_a_disk_names_the_folder(tmp_path: Path) -> None:
    assert measure_space(CPU, {"disk": 1}, tmp_path / "offload").folder == str(tmp_path / "offload")


def test_the_whole_machine_is_what_the_user_allows_of_it_whether_it_is_free_or_not() -> None:
    assert whole_machine(GPU, {}).available["device"] == 16 * GIB - 512 * MIB
    limited = whole_machine(GPU, {"host": 20 * GIB})
    assert (limited.available["host"], limited.limits, limited.is_gpu) == (20 * GIB, {"host": 20 * GIB}, True)

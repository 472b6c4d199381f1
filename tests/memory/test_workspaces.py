"""Workspaces of the worker's thread are made in another thread than the caller's, before anybody waits for the worker."""

from __future__ import annotations

import threading

import pytest
import torch

from flexgen_helm.memory import workspaces
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.workspaces import make_workspaces

GPU = Device(torch.device("cuda"))


def test_a_thread_that_has_ended_multiplied_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def multiply(device: torch.device, dtype: torch.dtype) -> None:
        assert (device, dtype) == (GPU.torch_device, torch.bfloat16)
        threads.append(threading.current_thread())

    monkeypatch.setattr(workspaces, "_multiply", multiply)
    make_workspaces(GPU, torch.bfloat16)
    make_workspaces(CPU, torch.bfloat16)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


def test_a_lack_of_memory_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(device: torch.device, dtype: torch.dtype) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(workspaces, "_multiply", multiply)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        make_workspaces(GPU, torch.bfloat16)

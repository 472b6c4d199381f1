"""Names of devices, and which GPU a thread works on."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.device import CPU, Device, resolve_device


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of three GPUs, on whose number 1 this thread works."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cuda", "cuda:1"),
        ("auto", "cuda:1"),
        (Device(torch.device("cuda")), "cuda:1"),
        ("cuda:2", "cuda:2"),
        ("cpu", "cpu"),
    ],
)
def test_a_gpu_has_its_number_from_the_thread_that_asks(three_gpus: None, given: str | Device, expected: str) -> None:
    assert resolve_device(given).torch_device == torch.device(expected)


def test_a_gpu_that_is_not_there_is_refused(three_gpus: None) -> None:
    with pytest.raises(FlexGenError, match="device is 'cuda:3', but torch sees GPUs 0 to 2"):
        resolve_device("cuda:3")


def test_a_memory_of_its_own_stays(three_gpus: None) -> None:
    played = Device(torch.device("cpu"), own_memory=True)
    assert resolve_device(played) is played
    assert resolve_device("cuda").own_memory


def test_only_a_gpu_can_be_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    gpu = torch.device("cuda:2")
    for device, expected in ((CPU, None), (Device(gpu), gpu)):
        with device.current() as entered:
            assert entered == expected

"""The limit of torch's memory on a GPU, which all engines of a process share, on functions of torch that only take notes."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.device_limit import DeviceLimits

GIB = 2**30
GPU = Device(torch.device("cuda:1"))


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, float]:
    """The fraction of each GPU that torch may take. A GPU has 16 GiB, of which this process holds 1."""
    found = {GPU.torch_device: 0.9}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 16 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", found.__getitem__)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: found.__setitem__(device, fraction)
    )
    return found


def test_an_engine_may_take_its_limit_in_addition_to_what_was_held(fractions: dict[torch.device, float]) -> None:
    limits = DeviceLimits()
    with limits.hold(GPU, 7 * GIB):
        assert fractions == {GPU.torch_device: (1 + 7) / 16}
    assert fractions == {GPU.torch_device: 0.9}


def test_engines_share_the_sum_of_their_limits_whichever_closes_first(fractions: dict[torch.device, float]) -> None:
    limits = DeviceLimits()
    with ExitStack() as second:
        with limits.hold(GPU, 7 * GIB):
            second.enter_context(limits.hold(GPU, 2 * GIB))
            assert fractions == {GPU.torch_device: (1 + 7 + 2) / 16}
        assert fractions == {GPU.torch_device: (1 + 2) / 16}
    assert fractions == {GPU.torch_device: 0.9}


@pytest.mark.parametrize("most", [None, 100 * GIB])
def test_what_the_process_may_take_is_never_raised(fractions: dict[torch.device, float], most: int | None) -> None:
    limits = DeviceLimits()
    with limits.hold(GPU, 7 * GIB), limits.hold(GPU, most):
        assert fractions == {GPU.torch_device: 0.9}


def test_an_error_releases_the_limit(fractions: dict[torch.device, float]) -> None:
    with pytest.raises(ValueError, match="torn"), DeviceLimits().hold(GPU, 7 * GIB):
        raise ValueError("torn")
    assert fractions == {GPU.torch_device: 0.9}


def test_a_cpu_has_no_such_limit(fractions: dict[torch.device, float]) -> None:
    with DeviceLimits().hold(CPU, 7 * GIB):
        assert fractions == {GPU.torch_device: 0.9}

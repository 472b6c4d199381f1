"""Half of every memory limit for each of two engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexgen_helm.errors import PolicyError
from flexgen_helm.fidelity import memory
from flexgen_helm.fidelity.memory import halves
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.types import Tier
from tests.workbench import OWN_MEMORY

FREE: dict[Tier, int] = {"device": 1000, "host": 3001, "disk": 9000}


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    def free_space(device: Device, folder: Path) -> dict[Tier, int]:
        assert isinstance(device.torch_device, torch.device)
        return dict(FREE)

    monkeypatch.setattr(memory, "free_space", free_space)


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        (CPU, None, {"host": 1500}),
        (CPU, {"host": 800}, {"host": 400}),
        (CPU, {"device": "1KiB"}, {"device": 512}),
        (CPU, {"disk": 100}, {"host": 1500, "disk": 50}),
        (OWN_MEMORY, None, {"device": 500, "host": 1500}),
        (OWN_MEMORY, {"device": 600, "disk": 7}, {"device": 300, "host": 1500, "disk": 3}),
    ],
)
def test_limits(device: Device, given: dict[str, int | str] | None, expected: dict[Tier, int]) -> None:
    assert halves(given, device) == expected


def test_a_limit_that_cannot_be_read() -> None:
    with pytest.raises(PolicyError, match="some of device, host, disk"):
        halves({"ram": 5}, CPU)

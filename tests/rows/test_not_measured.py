"""A verdict from another device than the one that computes says nothing of that one's bits."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexgen_helm.loading.source import open_model
from flexgen_helm.memory.device import Device
from flexgen_helm.rows.choice import Passed, log_choice
from flexgen_helm.rows.self_check import Verdict
from flexgen_helm.runtime import load_model
from flexgen_helm.types import ResolvedPolicy, WeightNumerics
from tests.models import save_tiny

POLICY = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=64)


@pytest.mark.parametrize(("device", "expected"), [("cuda:0", None), ("cpu", True)])
def test_bits_of_a_gpu_are_not_measured_on_a_cpu(device: str, expected: bool | None, tmp_path: Path) -> None:
    """The device has no room for the check, so that it runs on the CPU."""
    where = Device(torch.device(device), own_memory=True)
    source = open_model(str(save_tiny("llama", tmp_path)), dtype="float32", device=where.torch_device)
    plan = SimpleNamespace(
        shapes=SimpleNamespace(first_layers_bytes=1), checking_bytes=1, space=SimpleNamespace(of=lambda tier: 1)
    )
    weights = WeightNumerics(source.digest(), "float32")
    blueprint = SimpleNamespace(
        source=source,
        plan=plan,
        device=where,
        rows="auto",
        kv_dtype=torch.float32,
        weights=weights,
        recheck=True,
        compiled=None,
    )
    passed = load_model._check_first_layers(blueprint, POLICY)  # type: ignore[arg-type]
    assert (passed.kind, passed.verdict.bit_stable) == ("packed", expected)
    assert passed.verdict.worst_difference < 1e-4


@pytest.mark.parametrize(
    ("bit_stable", "said"), [(True, None), (False, "bit-stability check failed"), (None, "was not measured on the device")]
)
def test_the_log_says_what_is_known(bit_stable: bool | None, said: str | None, caplog: pytest.LogCaptureFixture) -> None:
    loaded = SimpleNamespace(name="org/model", model=SimpleNamespace(config=SimpleNamespace(model_type="llama")))
    passed = Passed("packed", Verdict(0.0, bit_stable, ()), None)
    with caplog.at_level(logging.INFO):
        log_choice(loaded, passed)  # type: ignore[arg-type]
    assert len(caplog.messages) == (said is not None)
    assert all(str(said) in message for message in caplog.messages)

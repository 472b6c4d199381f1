"""The place of attention in an engine's numerics, and back in the policy of a resumed command."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows.choice import CheckedModel, Kind, Passed
from flexgen_helm.rows.self_check import Verdict
from flexgen_helm.runtime.building import numerics_of
from flexgen_helm.types import ON_DEVICE, ON_HOST, CacheNumerics, ResolvedPolicy, Shares, WeightNumerics

GPU = Device(torch.device("cuda:0"))
PLAYED = Device(torch.device("cpu"), own_memory=True)


@pytest.mark.parametrize(
    ("device", "kind", "cpu_attention", "cache", "expected", "fields"),
    [
        (GPU, "packed", 1.0, ON_HOST, ("cuda", "host"), {"cpu_attention": 1.0}),
        (GPU, "packed", 0.0, ON_HOST, ("cuda", "device"), {"cpu_attention": 0.0}),
        (GPU, "packed", 1.0, ON_DEVICE, ("cuda", "device"), {"cpu_attention": 0.0}),
        (GPU, "single", 1.0, ON_HOST, ("cuda", "device"), {}),  # the model's own attention
        (CPU, "packed", 1.0, ON_HOST, ("cpu", "device"), {}),
        (PLAYED, "packed", 0.5, (0.5, 0.5, 0.0), ("cpu", "device"), {}),
    ],
)
def test_the_place_is_named_on_a_gpu(
    device: Device, kind: Kind, cpu_attention: float, cache: Shares, expected: tuple[str, str], fields: dict[str, Any]
) -> None:
    policy = ResolvedPolicy(gpu_batch_size=16, gpu_batch_tokens=64, cpu_attention=cpu_attention, cache=cache)
    model = RecordedModel.__new__(RecordedModel)
    model.matmul, model.compiled = "torch", None
    checked = CheckedModel(model, Passed(kind, Verdict(0.0, True, ()), None))
    found = numerics_of(WeightNumerics("digest", "float32"), checked, policy, device, CacheNumerics("float32"))
    assert (found.machine.device, found.machine.attention) == expected
    assert found.policy_fields == {"gpu_batch_size": 16, "gpu_batch_tokens": 64, **fields}

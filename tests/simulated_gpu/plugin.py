"""For pytest: where torch sees no CUDA device, tests marked ``gpu`` run on the simulated one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from flexgen_helm.model.layers import layer_kinds
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows.choice import CHECKS
from flexgen_helm.rows.self_check import FirstLayers, Verdict
from flexgen_helm.types import ResolvedPolicy
from tests.simulated_gpu.patches import simulated_gpu

VerdictKey = tuple[type, torch.dtype, str]
"""Class of the model, dtype and kind of device."""


@pytest.fixture(scope="session")
def known_verdicts() -> dict[VerdictKey, Verdict]:
    """What self-checks found in this session under `one_check`."""
    return {}


@pytest.fixture(scope="module")
def one_check(known_verdicts: dict[VerdictKey, Verdict]) -> Iterator[None]:
    """Without a CUDA device, the self-check at load runs for the first of equal models on a device, of any depth.

    It takes several times as long as the jobs of a test on the simulated GPU. Tiny models of a class have the same weights, so
    that its verdict holds for the others.
    """
    check = CHECKS["packed"]

    def checked(model: RecordedModel, policy: ResolvedPolicy, *, max_length: int, first: FirstLayers | None = None) -> Verdict:
        kinds = layer_kinds(model.model, model.layers)
        key = type(model.model), model.model.dtype, model.device.type
        if key not in known_verdicts or max(kinds) >= len(known_verdicts[key].layers):
            known_verdicts[key] = check(model, policy, max_length=max_length, first=first)
        return known_verdicts[key].of_all_layers(kinds)

    if torch.cuda.is_available():
        yield
        return
    with patch.dict(CHECKS, packed=checked):
        yield


@pytest.fixture(autouse=True)
def gpu_of_marked_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Simulates a GPU for a test marked ``gpu``, which fails where work was not ordered or operands on different devices.

    The mark's argument ``needs`` says what of a real GPU a test cannot do without; it is then skipped.
    """
    mark = request.node.get_closest_marker("gpu")
    if mark is None or torch.cuda.is_available():
        yield
        return
    if "needs" in mark.kwargs:
        pytest.skip(f"torch sees no CUDA device on this machine, and a simulated one has no {mark.kwargs['needs']}")
    with simulated_gpu() as gpu:
        yield
        gc.collect()
        assert not gpu.faults, "\n".join(gpu.faults)

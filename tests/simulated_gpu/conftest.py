"""Fixtures of the simulated GPU's own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.rows.choice import CHECKS
from flexgen_helm.rows.self_check import Verdict
from flexgen_helm.types import ResolvedPolicy
from tests.models import save_tiny
from tests.simulated_gpu.engines import NUM_LAYERS


@pytest.fixture(scope="module")
def one_check() -> Iterator[None]:
    """The self-check at load runs for the first of equal models on a device only; its verdict holds for the others."""
    check, known = CHECKS["packed"], dict[tuple[object, ...], Verdict]()

    def checked(model: RecordedModel, policy: ResolvedPolicy, *, max_length: int) -> Verdict:
        key = type(model.model), len(model.layers), model.device.type
        if key not in known:
            known[key] = check(model, policy, max_length=max_length)
        return known[key]

    with patch.dict(CHECKS, packed=checked):
        yield


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a family's tiny model."""

    @cache
    def folder(family: str) -> Path:
        num_layers = None if family == "gemma2" else NUM_LAYERS  # whose layers differ: it has four
        return save_tiny(family, tmp_path_factory.mktemp(family), num_layers=num_layers)

    return folder

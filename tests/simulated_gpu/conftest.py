"""Fixtures of the simulated GPU's own tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.models import save_tiny
from tests.simulated_gpu.engines import NUM_LAYERS


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a family's tiny model."""

    @cache
    def folder(family: str) -> Path:
        num_layers = None if family == "gemma2" else NUM_LAYERS  # whose layers differ: it has four
        return save_tiny(family, tmp_path_factory.mktemp(family), num_layers=num_layers)

    return folder

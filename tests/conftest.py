"""What tests of several packages need."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.errors import CorruptFile, FlexGenError


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct, fetched once; skips the test where that is not possible."""
    try:
        return smollm2_folder()
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))

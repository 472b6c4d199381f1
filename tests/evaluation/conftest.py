"""A tiny model with a tokenizer for any text, and real questions."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.assets import install_helm_data
from flexgen_helm.errors import CorruptFile, FlexGenError
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("qwen3", tmp_path_factory.mktemp("models"))
    save_character_tokenizer(folder)
    return folder


@pytest.fixture
def helm_data(tmp_path: Path) -> Path:
    """An output folder of HELM with the data of the package's suites in it."""
    try:
        install_helm_data(tmp_path)
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    return tmp_path

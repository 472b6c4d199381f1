"""Tiny and real models, and engines that are closed after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from flexgen_helm.helm.registry import ENGINES
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer, save_pair_tokenizer


@pytest.fixture(autouse=True)
def _close_engine() -> Iterator[None]:
    yield
    ENGINES.close()


@pytest.fixture(scope="session")
def writing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are characters and pairs of letters, without a BOS token."""
    folder = save_tiny("qwen3", tmp_path_factory.mktemp("writing"))
    save_character_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are pairs of letters, behind a BOS token."""
    folder = save_tiny("qwen3", tmp_path_factory.mktemp("bos"))
    save_pair_tokenizer(folder, adds_bos=True)
    return folder

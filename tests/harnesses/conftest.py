"""Models that tests of both harnesses use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.text_models import CHATML, save_llama
from tests.tiny_tokenizers import byte_level, metaspace_bpe


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer and a chat template."""
    torch.set_num_threads(1)
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    return save_llama(tokenizer, tmp_path_factory.mktemp("chat_model"))


@pytest.fixture(scope="session")
def bos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer writes BOS and a space before each text; it has no chat template."""
    torch.set_num_threads(1)
    return save_llama(metaspace_bpe(adds_bos=True), tmp_path_factory.mktemp("bos_model"))

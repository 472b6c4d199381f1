"""Tiny models that run in single rows, through HELM: answers of client and runner equal plain ``transformers``."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from helm.clients.auto_client import AutoClient
from helm.common.cache_backend_config import BlackHoleCacheBackendConfig
from helm.common.request import Request

import flexgen_helm.plugin  # noqa: F401  registers the generators of deployments
from tests.helm.suites import assert_client_and_runner_equal_transformers
from tests.models import SINGLE, save_tiny
from tests.tokenizers import save_character_tokenizer

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("close_engine")]
FREQUENT = ("qwen3_5_text",)
NO_CONTEXT = ("bloom", "mamba2")
"""Their configurations name no context window, without which HELM cannot cut prompts to fit."""


def save_hybrid(family: str, folder: Path) -> Path:
    """Saves a tiny model with a tokenizer."""
    saved = save_tiny(family, folder)
    save_character_tokenizer(saved)
    return saved


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in FREQUENT else pytest.mark.slow)
        for family in SINGLE
        if family not in NO_CONTEXT
    ],
)
def test_client_and_runner_equal_transformers(family: str, tmp_path: Path, helm_output: Path) -> None:
    assert_client_and_runner_equal_transformers(save_hybrid(family, tmp_path), helm_output, 3)


def test_helms_log_says_once_that_rows_are_single_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    handler, helms = logging.Handler(), logging.getLogger("helm")
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(helms, "handlers", [handler])
    monkeypatch.setattr(helms, "level", logging.INFO)
    folder = save_hybrid("falcon_h1", tmp_path)
    client = AutoClient({}, str(tmp_path), BlackHoleCacheBackendConfig())
    for prompt in ("one", "two"):
        deployment = f"flexgen/{folder}"
        request = Request(model="any/model", model_deployment=deployment, prompt=prompt, max_tokens=2, temperature=0)
        assert client.make_request(request).success
    (line,) = [line for line in lines if "single rows" in line]
    assert re.search(rf"falcon_h1 \(falcon_h1\) runs in single rows.*{SINGLE['falcon_h1'].reason}", line)

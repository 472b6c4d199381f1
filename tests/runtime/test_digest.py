"""The digest of a model: equal for equal answers, another one for whatever can change them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexgen_helm.runtime.digest import model_digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "model"
    made.mkdir()
    for name in ("model.safetensors", "config.json", "README.md"):
        (made / name).write_text(name)
    return made


def test_documentation_and_place_change_nothing(folder: Path, tmp_path: Path) -> None:
    before = model_digest(folder)
    (folder / "README.md").write_text("other words")
    assert model_digest(folder) == before
    assert model_digest(folder.rename(tmp_path / "elsewhere")) == before


@pytest.mark.parametrize("name", ["chat_template.jinja", "merges.txt", "spiece.model", "config.json", "qwen.tiktoken"])
def test_whatever_a_model_or_tokenizer_reads_changes_it(name: str, folder: Path) -> None:
    before = model_digest(folder)
    (folder / name).write_text("other")
    assert model_digest(folder) != before


def test_weights_of_equal_size_and_time_are_told_apart(folder: Path) -> None:
    weights = folder / "model.safetensors"
    before, times = model_digest(folder), weights.stat()
    weights.write_text("m" * times.st_size)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_digest(folder) != before

"""HELM's side finds a model where the engine finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.model_files import find_model
from flexgen_helm.loading.hub_folder import folder_without_weights

Asked = list[tuple[str, str | None, tuple[str, ...]]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the hub was asked for, in a folder and a home that hold one model."""
    folder = tmp_path / "some" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "file.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    calls: Asked = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


@pytest.mark.parametrize(
    ("name", "found", "on_the_hub"),
    [
        ("some/model", True, False),
        ("~/some/model", True, False),
        ("./some/model", True, False),
        (os.devnull, False, False),
        ("./none", False, False),
        ("~/none", False, False),
        ("/none/none", False, False),
        ("none/none/none", False, False),
        ("file.gguf", False, False),
        ("none/file.gguf", False, False),
        ("organization/model", True, True),
        ("gpt2", True, True),
    ],
)
def test_helm_and_engine_mean_the_same_by_a_name(name: str, found: bool, on_the_hub: bool, asked: Asked) -> None:
    finders: tuple[Callable[[str, str | None], object], ...] = (find_model, folder_without_weights)
    for find in finders:
        if found:
            find(name, "v1")
        else:
            with pytest.raises(FlexGenError):
                find(name, "v1")
    assert [call[:2] for call in asked] == [(name, "v1")] * 2 * on_the_hub
    assert len({call[2] for call in asked}) == on_the_hub


def test_finding_a_model_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    code = f"import sys; from flexgen_helm.helm.model_files import find_model; find_model({str(tmp_path)!r})"
    code += "; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""A large checkpoint is checked on its first layers, and what is refused is refused before the others are read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Job, UnsupportedModel
from flexgen_helm.runtime import engine
from flexgen_helm.runtime.checkpoint import StoredTensor
from tests.models import FAMILIES, SINGLE, Family, SingleFamily, save_tiny
from tests.runtime.conftest import POLICY

DEEP: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 9},
    "gemma2": {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4},
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read, once all checkpoints count as large."""
    names: list[str] = []
    original = StoredTensor.to

    def to(self: StoredTensor, *args: Any, **kwargs: Any) -> Any:
        names.append(self.name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StoredTensor, "to", to)
    monkeypatch.setattr(engine, "LARGE_BYTES", 0)
    return names


def layers_of(names: list[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))}


def save(family: Family | SingleFamily, folder: Path) -> str:
    AutoModelForCausalLM.from_config(family.build()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", DEEP)
def test_first_layers_are_read_first_and_hold_every_kind(name: str, read: list[str], tmp_path: Path) -> None:
    family = replace(FAMILIES[name], overrides={**FAMILIES[name].overrides, **DEEP[name]})
    with Engine.from_pretrained(save(family, tmp_path), device="cpu", policy=POLICY) as loaded:
        assert len(loaded.run([Job(token_ids=[5, 6, 7], max_new_tokens=2)])[0].completions[0].token_ids) == 2
    again = read.index(read[0], 1)
    assert layers_of(read[:again]) == {0, 1}
    assert layers_of(read[again:]) == set(range(DEEP[name]["num_hidden_layers"]))


@pytest.mark.parametrize("name", [*FAMILIES, *SINGLE])
def test_no_family_is_lost(name: str, read: list[str], tmp_path: Path) -> None:
    with Engine.from_pretrained(str(save_tiny(name, tmp_path)), device="cpu", policy=POLICY) as loaded:
        assert loaded.rows == ("packed" if name in FAMILIES else "single")


def test_a_refusal_reads_no_other_layer(read: list[str], tmp_path: Path) -> None:
    family = replace(SINGLE["falcon"], changes={**SINGLE["falcon"].changes, "num_hidden_layers": 7})
    folder = save(family, tmp_path)
    with pytest.raises(UnsupportedModel, match="in packed rows layer 0"):
        Engine.from_pretrained(folder, device="cpu", policy=POLICY, rows="packed")
    assert layers_of(read) == {0, 1}

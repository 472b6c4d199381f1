"""A large checkpoint is checked on its first layers, and what is refused is refused before the others are read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from flexgen_helm import Engine, Job, UnsupportedModel
from flexgen_helm.loading import assembly
from flexgen_helm.loading.checkpoint import StoredTensor
from flexgen_helm.runtime import load_model
from tests.dimensions import VOCAB_SIZE
from tests.models import FAMILIES, SINGLE, Family, SingleFamily, save_tiny
from tests.workbench import POLICY

FEW_TOKENS = 100
DEEP: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 9},
    "gemma2": {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4},
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[StoredTensor]:
    """The tensors that are read, once all checkpoints and vocabularies count as large."""
    tensors: list[StoredTensor] = []
    original = StoredTensor.to

    def to(self: StoredTensor, *args: Any, **kwargs: Any) -> Any:
        tensors.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StoredTensor, "to", to)
    monkeypatch.setattr(load_model, "LARGE_BYTES", 0)
    monkeypatch.setattr(assembly, "FEW_TOKENS", FEW_TOKENS)
    return tensors


def layers_of(tensors: list[StoredTensor]) -> set[int]:
    return {int(found[1]) for tensor in tensors if (found := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", tensor.name))}


def save(family: Family | SingleFamily, folder: Path) -> str:
    AutoModelForCausalLM.from_config(family.build()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", DEEP)
def test_first_layers_are_read_first_and_hold_every_kind(name: str, read: list[StoredTensor], tmp_path: Path) -> None:
    family = replace(FAMILIES[name], overrides={**FAMILIES[name].overrides, **DEEP[name]})
    with Engine.from_pretrained(save(family, tmp_path), device="cpu", policy=POLICY) as loaded:
        assert len(loaded.run([Job(token_ids=[5, 6, 7], max_new_tokens=2)])[0].completions[0].token_ids) == 2
    again = [tensor.name for tensor in read].index(read[0].name, 1)
    assert layers_of(read[:again]) == {0, 1}
    assert {tensor.shape[0] for tensor in read[:again] if "embed" in tensor.name} == {FEW_TOKENS}
    assert {tensor.shape[0] for tensor in read[again:] if "embed" in tensor.name} == {VOCAB_SIZE}
    assert layers_of(read[again:]) == set(range(DEEP[name]["num_hidden_layers"]))


@pytest.mark.parametrize("name", [*FAMILIES, *SINGLE])
def test_no_family_is_lost(name: str, read: list[StoredTensor], tmp_path: Path) -> None:
    with Engine.from_pretrained(str(save_tiny(name, tmp_path)), device="cpu", policy=POLICY) as loaded:
        assert loaded.rows == ("packed" if name in FAMILIES else "single")


def test_a_refusal_reads_no_other_layer(read: list[StoredTensor], tmp_path: Path) -> None:
    family = replace(SINGLE["falcon"], changes={**SINGLE["falcon"].changes, "num_hidden_layers": 7})
    folder = save(family, tmp_path)
    with pytest.raises(UnsupportedModel, match="in packed rows layer 0"):
        Engine.from_pretrained(folder, device="cpu", policy=POLICY, rows="packed")
    assert layers_of(read) == {0, 1}

"""A large checkpoint is checked on its first layers, and what is refused is refused before the others are read."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen_helm import CorruptFile, Engine, Job, UnsupportedModel
from flexgen_helm.loading import assembly
from flexgen_helm.loading.checkpoint import StoredTensor
from flexgen_helm.loading.read_model import read_first_layers
from flexgen_helm.loading.source import open_model
from flexgen_helm.rows.choice import check_model
from flexgen_helm.runtime import load_model
from tests.dimensions import VOCAB_SIZE
from tests.loading.test_read_model import CPU
from tests.models import FAMILIES, SINGLE, Family, SingleFamily, save_tiny
from tests.runtime.test_exactness import SERVED
from tests.survey.configs import tiny_config
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


@pytest.mark.parametrize("name", SERVED)
def test_no_family_is_lost(name: str, read: list[StoredTensor], tmp_path: Path) -> None:
    """The first layers pass the check as the whole model does, which `tests.runtime.test_exactness` loads."""
    source = open_model(str(save_tiny(name, tmp_path)), dtype="float32", device=CPU)
    found = check_model(source.first_layers(), POLICY, "auto").passed
    assert found.kind == ("packed" if name in FAMILIES else "single")


def test_a_refusal_reads_no_other_layer(read: list[StoredTensor], tmp_path: Path) -> None:
    family = replace(SINGLE["falcon"], changes={**SINGLE["falcon"].changes, "num_hidden_layers": 7})
    folder = save(family, tmp_path)
    with pytest.raises(UnsupportedModel, match="in packed rows layer 0"):
        Engine.from_pretrained(folder, device="cpu", policy=POLICY, rows="packed")
    assert layers_of(read) == {0, 1}


def test_a_torn_file_is_read_once(read: list[StoredTensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file becomes shorter after its header was checked. The error says so at once, without another attempt."""
    folder = save_tiny("llama", tmp_path)
    counted = StoredTensor.to

    def to(self: StoredTensor, *args: Any, **kwargs: Any) -> Any:
        os.truncate(self.file, self.start)
        return counted(self, *args, **kwargs)

    monkeypatch.setattr(StoredTensor, "to", to)
    with pytest.raises(CorruptFile, match="ends inside the tensor"):
        read_first_layers("model", folder, AutoConfig.from_pretrained(folder), device=CPU)
    assert len(read) == 1


@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("llama", True),
        ("gemma3n_text", False),  # another table has as many rows, which vocab_size does not count
        ("inkling2_text", False),  # the head has rows that vocab_size does not count
        ("cpmant", False),  # the table has rows for more than tokens
        ("modernbert-decoder", False),  # there must be a padding token, which is among those that are cut
    ],
)
def test_the_vocabulary_is_cut_where_it_only_counts_rows(
    kind: str, cut: bool, read: list[StoredTensor], tmp_path: Path
) -> None:
    config = tiny_config(kind)
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    few = read_first_layers("model", tmp_path, config, device=CPU)
    expected = whole.state_dict()
    for name, tensor in few.state_dict().items():
        assert torch.equal(tensor, expected[name][: len(tensor)] if tensor.dim() else expected[name]), name
    embeddings: Any = few.get_input_embeddings()
    assert (len(embeddings.weight) == FEW_TOKENS) is cut
    assert len({tensor.name for tensor in read}) == len(read)


def test_weights_of_another_vocabulary_are_refused_once(read: list[StoredTensor], tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    config = AutoConfig.from_pretrained(folder, vocab_size=VOCAB_SIZE + 1)
    with pytest.raises(CorruptFile, match=rf"has the shape \[{VOCAB_SIZE}, .* it is \[{VOCAB_SIZE + 1}, "):
        read_first_layers("model", folder, config, device=CPU)
    assert not read

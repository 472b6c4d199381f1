"""The digest of a model: equal for equal answers, another one for whatever can change them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import transformers

from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.digest import model_digest


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


VOCABULARIES = re.compile(r"VOCAB_FILES_NAMES = \{(.*?)\}", re.DOTALL)
OTHER_FILES = [
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tools.jinja", "processor_config.json"),
    *("tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "tokenizer.4.0.0.json"),
]
"""What transformers reads whatever the class of the tokenizer is."""


def vocabularies() -> set[str]:
    """Names of the files of all tokenizers of transformers, as its own source has them."""
    sources = [path.read_text() for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")]
    tables = [table for source in sources for table in VOCABULARIES.findall(source)]
    return {name for table in tables for name in re.findall(r':\s*"([^"]+)"', table)}


def test_the_names_of_transformers_are_found() -> None:
    assert {"tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "bpe.codes"} <= vocabularies()


@pytest.mark.parametrize("name", sorted({*OTHER_FILES, *vocabularies()}))
def test_whatever_a_model_or_tokenizer_reads_changes_it(name: str, folder: Path) -> None:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    digests = [model_digest(folder)]
    for content in ("one", "two"):
        file.write_text(content)
        digests.append(model_digest(folder))
    assert len(set(digests)) == 3


def test_a_file_of_another_name_is_another_file(folder: Path) -> None:
    (folder / "vocab.json").write_text("one")
    before = model_digest(folder)
    (folder / "vocab.json").rename(folder / "vocab.txt")
    assert model_digest(folder) != before


def test_weights_of_equal_size_and_time_are_told_apart(folder: Path) -> None:
    weights = folder / "model.safetensors"
    before, times = model_digest(folder), weights.stat()
    weights.write_text("m" * times.st_size)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert model_digest(folder) != before


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CorruptFile, match=r"model\.safetensors cannot be read \(Is a directory\)"):
        model_digest(folder)

"""A tokenizer splits texts as its tokenizer.json says, whatever class is named beside it; `tokenizers` itself is the judge."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config

from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.tokenizer_files import read_tokenizer
from tests.tiny_tokenizers import byte_level, metaspace_bpe, metaspace_unigram, wordpiece

TEXTS = ["Hello  world </s> x 123 456", "cafe\u0301 naïve", "  a\n\nb</s>b <tool>x", "日本 😀", "<s>a"]
MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": lambda: byte_level(adds_bos=True),
    "metaspace": lambda: metaspace_bpe(adds_bos=True),
    "unigram": metaspace_unigram,
    "wordpiece": wordpiece,
}


def save(tokenizer: PreTrainedTokenizerBase, folder: Path, named: str | None, *, kind: str = "llama") -> Path:
    """Saves a tokenizer that has a token of its own, with the class that its settings name."""
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool>")])
    (LlamaConfig if kind == "llama" else Qwen2Config)(vocab_size=500).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": "{{ messages[0].content }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"tokenizer_class": named} if named else {})))
    return folder


@pytest.mark.parametrize(
    "named", [None, "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"]
)
@pytest.mark.parametrize("maker", MAKERS)
def test_texts_become_tokens_as_the_file_says(tmp_path: Path, maker: str, named: str | None) -> None:
    for kind in ("llama", "qwen2"):
        folder = save(MAKERS[maker](), tmp_path / kind, named, kind=kind)
        written = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = read_tokenizer("org/model", folder)
        assert tokenizer is not None
        for text in TEXTS:
            for special in (False, True):
                ids = written.encode(text, add_special_tokens=special).ids
                assert tokenizer(text, add_special_tokens=special).input_ids == ids, text
                decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                assert decoded == written.decode(ids, skip_special_tokens=False), text
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        assert tokenizer.chat_template == "{{ messages[0].content }}"
        assert written.get_vocab(with_added_tokens=True).items() <= tokenizer.get_vocab().items()


def test_class_that_adds_a_beginning_keeps_it(tmp_path: Path) -> None:
    folder = save(byte_level(), tmp_path, "CodeLlamaTokenizer")
    tokenizer = read_tokenizer("org/model", folder)
    assert tokenizer is not None
    plain = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("some text").ids
    assert tokenizer("some text").input_ids == [1, *plain]
    assert AutoTokenizer.from_pretrained(folder)("some text").input_ids[0] == 1


def test_pipeline_that_was_replaced_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flexgen_helm"):
        read_tokenizer("org/model", save(metaspace_bpe(), tmp_path / "one", "LlamaTokenizerFast"))
        read_tokenizer("org/model", save(metaspace_bpe(), tmp_path / "two", "PreTrainedTokenizerFast"))
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("org/model: the normalizer and the pre_tokenizer of tokenizer.json is used")
    assert "LlamaTokenizer" in line


def test_tokenizer_that_class_and_file_agree_on_is_that_of_transformers(tmp_path: Path) -> None:
    folder = save(byte_level(adds_bos=True), tmp_path / "one", "PreTrainedTokenizerFast")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert_same(folder)


def test_real_tokenizer_is_that_of_transformers(real_model: Path) -> None:
    assert_same(real_model)


def assert_same(folder: Path) -> None:
    expected, tokenizer = AutoTokenizer.from_pretrained(folder), read_tokenizer("org/model", folder)
    assert tokenizer is not None
    assert type(tokenizer) is type(expected)
    for text in TEXTS:
        assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    assert tokenizer.chat_template == expected.chat_template


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_torn_file_is_not_taken_for_a_missing_one(tmp_path: Path, file: str) -> None:
    folder = save(byte_level(), tmp_path / "model", None)
    (folder / file).write_bytes(b'{"a": "b')
    with pytest.raises(CorruptFile, match=f"{file} cannot be read as JSON"):
        read_tokenizer("org/model", folder)
    (folder / file).unlink()
    (folder / file).symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorruptFile, match=f"{file} cannot be read as JSON"):
        read_tokenizer("org/model", folder)


def test_link_to_the_only_file_is_not_taken_for_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorruptFile, match=r"tokenizer\.json cannot be read"):
        read_tokenizer("org/model", tmp_path)

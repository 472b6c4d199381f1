"""Whatever is wrong in the small files of a model folder: the command answers, or ends with status 2 and one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.cli import main
from tests.dimensions import VOCAB_SIZE
from tests.models import save_tiny
from tests.tokenizers import save_pair_tokenizer

Change = Callable[[Path], object]
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"


def fields(file: str, **changed: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changed))

    return change


def without(file: str, *names: str) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({name: value for name, value in content.items() if name not in names}))

    return change


def text(file: str, content: str) -> Change:
    return lambda folder: (folder / file).write_text(content)


def torn(file: str) -> Change:
    """Cuts the file, as a copy that did not end would."""

    def change(folder: Path) -> None:
        path = folder / file
        content = path.read_bytes() if path.exists() else b'{"a": "b"}'
        path.write_bytes(content[: len(content) // 2])

    return change


def dangling(file: str) -> Change:
    """Leaves a link to a file that was not fetched."""

    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(folder / "blobs" / "nothing")

    return change


SERVED: dict[str, Change] = {
    "flash attention in the config": fields(CONFIG, _attn_implementation="flash_attention_2"),
    "attention from the hub": fields(CONFIG, _attn_implementation="kernels-community/flash-attn"),
    "attention as eager": fields(CONFIG, _attn_implementation="eager"),
    "no architectures": without(CONFIG, "architectures"),
    "architectures as text of a fork": fields(CONFIG, architectures="OwnLlamaForCausalLM"),
    "architectures that are numbers": fields(CONFIG, architectures=[1]),
    "fields of a fork": fields(CONFIG, some_new_thing={"a": [1]}, train_batch="auto"),
    "no generation config": lambda folder: (folder / GENERATION).unlink(),
    "unknown tokenizer class": fields(TOKENIZER_CONFIG, tokenizer_class="BrandNewTokenizer"),
}
REFUSED: dict[str, tuple[Change, str]] = {
    "pad token behind the last": (fields(CONFIG, pad_token_id=VOCAB_SIZE), "pad_token_id"),
    "pad token far below zero": (fields(CONFIG, pad_token_id=-VOCAB_SIZE - 1), "pad_token_id"),
    "unknown activation": (fields(CONFIG, hidden_act="newact"), "hidden_act='newact'"),
    "unknown rope": (fields(CONFIG, rope_parameters={"rope_type": "newrope", "rope_theta": 1.0}), "rope_type='newrope'"),
    "rope that is a list": (fields(CONFIG, rope_parameters=[1]), "rope_parameters"),
    "rope that lacks its factor": (fields(CONFIG, rope_parameters={"rope_type": "linear", "rope_theta": 1.0}), "factor"),
    "layers as text": (fields(CONFIG, num_hidden_layers="two"), "num_hidden_layers"),
    "no layers": (fields(CONFIG, num_hidden_layers=0), "num_hidden_layers"),
    "negative width": (fields(CONFIG, hidden_size=-64), "hidden_size"),
    "width that no heads divide": (fields(CONFIG, hidden_size=63), "lm_head.weight"),
    "no heads": (fields(CONFIG, num_attention_heads=0), "num_attention_heads"),
    "no vocabulary": (fields(CONFIG, vocab_size=0), "vocab_size"),
    "vocabulary of null": (fields(CONFIG, vocab_size=None), "vocab_size"),
    "context of null": (fields(CONFIG, max_position_embeddings=None), "max_position_embeddings"),
    "negative context": (fields(CONFIG, max_position_embeddings=-1), "max_position_embeddings"),
    "unknown dtype": (fields(CONFIG, dtype="float12"), "float12"),
    "norm constant as text": (fields(CONFIG, rms_norm_eps="small"), "rms_norm_eps"),
    "no type": (without(CONFIG, "model_type"), "None"),
    "type that is a list": (fields(CONFIG, model_type=["llama"]), "['llama']"),
    "config that is a list": (text(CONFIG, "[1]"), CONFIG),
    "end token as text": (fields(GENERATION, eos_token_id="</s>"), "eos_token_id"),
    "early stopping that does not validate": (fields(GENERATION, early_stopping="sometimes"), "early_stopping"),
    "cache that does not exist": (fields(GENERATION, cache_implementation="brand_new"), "cache_implementation"),
    "generation config that is a list": (text(GENERATION, "[1]"), GENERATION),
    "tokenizer without a model": (text(TOKENIZER, "{}"), "tokenizer"),
    "tokenizer with an unknown part": (fields(TOKENIZER, pre_tokenizer={"type": "BrandNew"}), "tokenizer"),
    "special token that is a number": (fields(TOKENIZER_CONFIG, bos_token=3), "tokenizer"),
    "tokenizer config that is a list": (text(TOKENIZER_CONFIG, "[1]"), TOKENIZER_CONFIG),
    "special tokens that are a list": (text(SPECIAL, "[1]"), SPECIAL),
    "template that is no text": (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{"), "chat_template"),
    **{f"torn {file}": (torn(file), file) for file in (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIAL, ADDED)},
    **{f"link to no {file}": (dangling(file), file) for file in (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIAL)},
}
"""What is done to the folder, and what the line must name."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("olmo2", tmp_path_factory.mktemp("hostile"))
    save_pair_tokenizer(folder, adds_bos=True)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "some-model"))


def generate(folder: Path) -> int:
    return main(["generate", "--model", str(folder), "--prompt", "aaab", "--max-new-tokens", "2", "--device", "cpu"])


def test_served_all_the_same(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {}
    for kind, change in {"as it was": lambda folder: None, **SERVED}.items():
        folder = Path(shutil.copytree(original, tmp_path / kind))
        change(folder)
        assert generate(folder) == 0, kind
        answers[kind] = capsys.readouterr().out
    assert len(set(answers.values())) == 1, answers


@pytest.mark.parametrize("kind", REFUSED)
def test_one_clear_line(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    change, named = REFUSED[kind]
    change(folder)
    status, shown = generate(folder), capsys.readouterr()
    assert status == 2, shown
    line = shown.err.splitlines()[-1]
    assert line.startswith("flexgen-helm: ")
    assert "some-model" in line
    assert named in line
    assert "Traceback" not in shown.err

"""Which tokens end a text: those that generation config, config or tokenizer name, each of which may lack some."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_helm import Engine, Job
from flexgen_helm.loading.source import open_model
from tests.tokenizers import PAIRS, SPECIAL, save_pair_tokenizer
from tests.workbench import POLICY, Workbench

CPU = torch.device("cpu")
PROMPT = "aaabacad"


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


@pytest.fixture
def folder(bench: Workbench, tmp_path: Path) -> Path:
    """A model with a tokenizer of letter pairs, to be edited."""
    copy = shutil.copytree(bench.folder("llama"), tmp_path / "model")
    save_pair_tokenizer(copy)
    return copy


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ends"),
    [
        (7, 7, None, {7}),
        (None, 7, None, {7}),
        ([], [7, 8], None, {7, 8}),
        ([7, 8], None, None, {7, 8}),
        (None, None, None, set()),
        (None, None, "</s>", {2}),
        ([], [], "</s>", {2}),
        (7, 1, "</s>", {7, 1, 2}),
        ([7, 8], [8, 1], "</s>", {7, 8, 1, 2}),
        # The config's is an ordinary word, which it has of its class rather than of its author.
        (None, 9, "</s>", {2}),
        (7, 9, None, {7}),
        # What the model never says does not matter.
        ([-1, 10**6], None, "</s>", {-1, 10**6, 2}),
    ],
)
def test_all_that_name_an_end_token_are_heard(
    generation: Any, config: Any, tokenizer: str | None, ends: set[int], folder: Path
) -> None:
    edit(folder / "generation_config.json", eos_token_id=generation)
    edit(folder / "config.json", eos_token_id=config)
    edit(folder / "tokenizer_config.json", eos_token=tokenizer)
    assert open_model(str(folder), dtype="float32", device=CPU).load().end_token_ids == ends


def test_without_a_tokenizer_the_configs_are_heard(bench: Workbench, tmp_path: Path) -> None:
    copy = shutil.copytree(bench.folder("llama"), tmp_path / "model")
    edit(copy / "generation_config.json", eos_token_id=7)
    edit(copy / "config.json", eos_token_id=[9])
    assert open_model(str(copy), dtype="float32", device=CPU).load().end_token_ids == {7, 9}


@pytest.mark.parametrize("generation", [None, [], 2])
def test_an_answer_ends_at_the_tokenizers_end_token(generation: Any, folder: Path) -> None:
    """As in HELM's own client, which cuts there what transformers generates."""
    edit(folder / "generation_config.json", eos_token_id=generation)
    edit(folder / "config.json", eos_token_id=generation)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    end = next(number for number in range(1, 8) if written[number] not in written[:number] and written[number] >= len(SPECIAL))
    edit(folder / "tokenizer_config.json", eos_token=PAIRS[written[end] - len(SPECIAL)])
    with Engine.from_pretrained(str(folder), dtype="float32", device="cpu", policy=POLICY) as engine:
        (completion,) = engine.run([Job(prompt=PROMPT, max_new_tokens=8)])[0].completions
        (ignoring,) = engine.run([Job(prompt=PROMPT, max_new_tokens=8, ignore_eos=True)])[0].completions
    assert (completion.token_ids, completion.finish_reason) == (written[: end + 1], "endoftext")
    assert completion.text == "".join(PAIRS[token - len(SPECIAL)] for token in written[:end])
    assert ignoring.token_ids == written

"""Fields of generation_config.json that change greedy answers are named at load; transformers' own generate is the judge."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor

from flexgen_helm import Engine, Job
from flexgen_helm.errors import CorruptFile, UnsupportedModel
from flexgen_helm.loading.generation_config import read_generation_config, unapplied_fields
from tests.workbench import POLICY, Workbench

PROMPT = [5, 9, 13, 21, 8, 70, 70, 70, 291]
"""Which the model continues by tokens of its own."""
CHANGING: dict[str, Any] = {
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 0.001,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "suppress_tokens": "greedy",
    "begin_suppress_tokens": "greedy",
    "bad_words_ids": "greedy",
    "sequence_bias": [[[7], 100.0]],
    "forced_eos_token_id": 7,
    "watermarking_config": {"bias": 100.0, "seeding_scheme": "lefthash"},
}
"""Values with which `generate` gives other tokens; "greedy" stands for the token that it would begin with."""
UNSEEN: dict[str, Any] = {
    "num_beams": 4,
    "forced_bos_token_id": 7,
    "min_length": 9,
    "min_new_tokens": 3,
    "exponential_decay_length_penalty": [2, 9.0],
    "guidance_scale": 2.0,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "force_words_ids": [[7]],
    "stop_strings": ["x"],
    "token_healing": True,
    "cache_implementation": "quantized",
}
"""The same, but only for other prompts, with a tokenizer or another package."""
HARMLESS: dict[str, Any] = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "typical_p": 0.5,
    "do_sample": True,
    "max_length": 99,
    "max_new_tokens": 3,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "prompt_lookup_num_tokens": 2,
    "cache_implementation": "static",
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
    "use_cache": False,
    "chat_format": "chatml",
}


@pytest.fixture(scope="module")
def model(bench: Workbench) -> Any:
    return AutoModelForCausalLM.from_pretrained(bench.folder("qwen2")).eval()


def greedy(model: Any, **fields: Any) -> list[int]:
    prompt = torch.tensor([PROMPT])
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False, **fields}
    return [int(token) for token in model.generate(prompt, **options)[0, len(PROMPT) :]]


def named(model: Any, **fields: Any) -> dict[str, Any]:
    model.generation_config = GenerationConfig.from_dict(fields)
    return unapplied_fields(model)


@pytest.mark.parametrize("field", CHANGING)
def test_fields_that_change_answers_of_generate_are_named(model: Any, field: str) -> None:
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    plain, value = greedy(model), CHANGING[field]
    if value == "greedy":
        value = [plain[:1]] if field == "bad_words_ids" else plain[:1]
    assert greedy(model, **GenerationConfig.from_dict({field: value}).to_diff_dict()) != plain
    assert set(named(model, **{field: value}, temperature=0.5, do_sample=True)) == {field}


@pytest.mark.parametrize("field", UNSEEN)
def test_fields_that_may_change_answers_are_named(model: Any, field: str) -> None:
    assert set(named(model, **{field: UNSEEN[field]})) == {field}


def test_harmless_fields_are_not_named(model: Any) -> None:
    assert named(model, **HARMLESS) == {}


def test_field_of_a_later_version_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(LogitsProcessor):
        pass

    ours = type(model)._get_logits_processor

    def later(self: Any, generation_config: Any, **options: Any) -> Any:
        found = ours(self, generation_config, **options)
        if getattr(generation_config, "brand_new_penalty", None):
            found.append(Later())
        return found

    monkeypatch.setattr(type(model), "_get_logits_processor", later)
    assert named(model, brand_new_penalty=2, other=3) == {"brand_new_penalty": 2}


def test_one_warning_at_load_and_the_same_answers(bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(bench.folder("qwen2"), tmp_path / "model"))
    content = json.loads((folder / "generation_config.json").read_text())
    fields = {"repetition_penalty": 5.0, "suppress_tokens": list(range(50)), "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(content | fields))
    job = Job(token_ids=PROMPT, max_new_tokens=8)
    with caplog.at_level(logging.WARNING, logger="flexgen_helm"), Engine.from_pretrained(str(folder), policy=POLICY) as engine:
        found = engine.run([job])
    warnings = [record.getMessage() for record in caplog.records if "not applied" in record.getMessage()]
    assert len(warnings) == 1
    for word in (str(folder), "generation_config.json", "repetition_penalty=5.0", "suppress_tokens=[0, 1", "HELM asks"):
        assert word in warnings[0]
    assert "temperature" not in warnings[0]
    assert found[0].completions == bench.engine("qwen2").run([job])[0].completions


def test_torn_file_is_not_taken_for_a_missing_one(bench: Workbench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.folder("qwen2"), tmp_path / "model"))
    file = folder / "generation_config.json"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CorruptFile, match=r"generation_config\.json cannot be read"):
        read_generation_config("org/model", folder)
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorruptFile, match=r"generation_config\.json cannot be read"):
        read_generation_config("org/model", folder)
    file.unlink()
    assert read_generation_config("org/model", folder)._from_model_config


@pytest.mark.parametrize("ends", ["</s>", [2, "</s>"], 2.5, True])
def test_end_token_that_is_no_id(bench: Workbench, tmp_path: Path, ends: Any) -> None:
    folder = Path(shutil.copytree(bench.folder("qwen2"), tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(UnsupportedModel, match=r"org/model: .*eos_token_id"):
        read_generation_config("org/model", folder)

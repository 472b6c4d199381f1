"""What is loaded a layer at a time equals what `from_pretrained` makes, to the bit, and says what does not fit."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import logging as transformers_logging

from flexgen_helm.errors import CorruptFile
from flexgen_helm.loading.assembly import empty_model
from flexgen_helm.loading.read_model import read_model
from flexgen_helm.loading.source import open_model
from tests.dimensions import VOCAB_SIZE
from tests.models import FAMILIES, SINGLE, SMALL, Family, save_tiny
from tests.workbench import Workbench

CPU = torch.device("cpu")
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "head_dim": 16}
COMPOSITE = {
    "gemma3": Family(
        "Gemma3Config",
        base={"text_config": TEXT, "vision_config": {**VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    ),
    "llama4": Family("Llama4Config", base={"text_config": SMALL | FAMILIES["llama4_text"].overrides, "vision_config": VISION}),
    "qwen3_5": Family(
        "Qwen3_5Config",
        base={
            "text_config": TEXT | {"linear_num_value_heads": 4, "linear_num_key_heads": 2},
            "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64},
        },
    ),
}
"""Models of text and images, of which all or only the text part is made."""


def read(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return read_model("org/model", folder, AutoConfig.from_pretrained(folder), dtype=dtype, device=CPU)


def everything(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns parameters and buffers, also those that no file holds."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def ties(model: PreTrainedModel) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values()}


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    found, tensors = everything(model), everything(expected)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape, found[name].device) == (tensor.dtype, tensor.shape, CPU), name
        assert torch.equal(found[name], tensor), name
    assert ties(model) == ties(expected)
    assert type(model) is type(expected)
    assert model.config.to_dict() | {"_name_or_path": ""} == expected.config.to_dict() | {"_name_or_path": ""}
    assert model.training == expected.training
    if expected.generation_config is not None:
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def save_in_layers(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Spreads the weights over many small shards, in another dtype if one is given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *SINGLE])
def test_family_equals_from_pretrained(bench: Workbench, family: str, dtype: torch.dtype) -> None:
    folder = bench.folder(family)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert_same(read(folder, dtype), expected)
    empty, tensors = empty_model(folder, expected.config, dtype).state_dict(), expected.state_dict()
    assert {name: tensor.dtype for name, tensor in empty.items()} == {name: tensor.dtype for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2", "gemma2"])
def test_shards_of_16_bits_equal_from_pretrained(tmp_path: Path, family: str) -> None:
    folder = save_tiny(family, tmp_path)
    save_in_layers(folder, torch.bfloat16)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(read(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("kind", COMPOSITE)
def test_composite_model_equals_from_pretrained(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(5)
    AutoModelForImageTextToText.from_config(COMPOSITE[kind].build()).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == kind
    assert_same(read(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_checkpoint_of_the_model_without_its_head(bench: Workbench, tmp_path: Path, family: str) -> None:
    """Names lack the prefix of the base model, and a tied head stands in no file."""
    model: Any = AutoModelForCausalLM.from_pretrained(bench.folder(family), tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    assert not any(name.startswith(f"{model.base_model_prefix}.") for name in load_file(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert_same(read(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path))


def test_modules_that_stay_in_float32(bench: Workbench) -> None:
    """The routing bias of DeepSeek V3 does, whatever the model's dtype."""
    model = read(bench.folder("deepseek_v3"), torch.bfloat16)
    kept = [name for name, tensor in everything(model).items() if tensor.dtype == torch.float32 and "bias" in name]
    assert kept
    assert model.dtype == torch.bfloat16


def test_file_without_generation_config(bench: Workbench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.folder("llama"), tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    assert_same(read(folder), AutoModelForCausalLM.from_pretrained(folder))


def test_tensors_that_the_model_does_not_have_are_reported(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(bench.folder("mixtral"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.9.mtp.weight": torch.ones(2), "model.layers.0.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(read(folder), AutoModelForCausalLM.from_pretrained(bench.folder("mixtral")))
    assert re.search(r"model\.layers\.9\.mtp\.weight +\| UNEXPECTED", caplog.text)
    assert "inv_freq" not in caplog.text


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias"),
    ],
)
def test_missing_tensor_is_named(bench: Workbench, tmp_path: Path, family: str, lost: str) -> None:
    folder = Path(shutil.copytree(bench.folder(family), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match=rf"org/model lack 1 tensors.* {lost}"):
        read(folder)


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Changes the names of all tensors, in files and index."""
    for file in folder.glob("*.safetensors"):
        save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    for file in folder.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {change(name): shard for name, shard in index["weight_map"].items()}
        file.write_text(json.dumps(index))


WRAPPED: dict[str, tuple[str, Callable[[str], str], tuple[str, ...]]] = {
    "DataParallel": ("mistral", "module.{}".format, ("'module.'", "DistributedDataParallel")),
    "compiled": ("mixtral", "_orig_mod.{}".format, ("'_orig_mod.'", "torch.compile")),
    "both": ("llama", "module._orig_mod.{}".format, ("'module._orig_mod.'", "DistributedDataParallel", "torch.compile")),
    "PEFT": ("llama", "base_model.model.{}".format, ("'base_model.model.'", "PEFT")),
    "compiled layers": ("llama", lambda name: name.replace(".mlp.", ".mlp._orig_mod."), ("'_orig_mod.'", "torch.compile")),
    "unknown": ("qwen2", "agent.policy.{}".format, ("'agent.policy.'",)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_names_of_a_wrapper_are_told_with_the_line_that_renames(bench: Workbench, tmp_path: Path, kind: str) -> None:
    family, change, words = WRAPPED[kind]
    folder = Path(shutil.copytree(bench.folder(family), tmp_path / "model"))
    rename(folder, change)
    with pytest.raises(CorruptFile) as caught:
        read(folder)
    message = str(caught.value)
    for word in ("org/model", *words):
        assert word in message
    line = re.search(r"AutoModelForCausalLM\..*\)", message)
    assert line is not None
    eval(line[0], {"AutoModelForCausalLM": AutoModelForCausalLM, "new_folder": tmp_path / "new"})
    assert_same(read(tmp_path / "new"), AutoModelForCausalLM.from_pretrained(bench.folder(family)))


def test_adapter_beside_the_weights_is_to_be_merged(bench: Workbench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.folder("llama"), tmp_path / "model"))
    rename(folder, lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."))
    tensors = load_file(folder / "model.safetensors")
    adapter = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 64)}
    save_file(tensors | adapter, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match=r"PEFT.*merge_and_unload\(\)") as caught:
        read(folder)
    assert "key_mapping" not in str(caught.value)


def test_base_model_whose_head_is_missing_is_told_so(bench: Workbench, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(bench.folder("llama"))
    model.base_model.save_pretrained(tmp_path)
    with pytest.raises(CorruptFile, match=r"lack 1 tensors.*lm_head\.weight\. That is the head.*LlamaModel.*Give a checkpoint"):
        read(tmp_path)


def test_empty_checkpoint_is_not_made_up(bench: Workbench, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bench.folder("llama"), tmp_path / "model"))
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match="lack 21 tensors"):
        read(folder)


def test_weights_do_not_change_with_their_file(bench: Workbench, tmp_path: Path) -> None:
    """Nothing stays mapped: who saves over a loaded folder changes no model in use."""
    folder = Path(shutil.copytree(bench.folder("llama"), tmp_path / "model"))
    model = read(folder)
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-1000, 2)
        stream.write(b"\x01" * 1000)
    assert_same(model, AutoModelForCausalLM.from_pretrained(bench.folder("llama")))


@pytest.mark.parametrize(("terminal", "wanted"), [(True, True), (True, False), (False, True)])
def test_one_bar_on_a_terminal_and_none_elsewhere(
    bench: Workbench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool, wanted: bool
) -> None:
    folder = bench.folder("mistral")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    before = transformers_logging.is_progress_bar_enabled()
    (transformers_logging.enable_progress_bar if wanted else transformers_logging.disable_progress_bar)()
    try:
        capsys.readouterr()
        read(folder)
        shown = capsys.readouterr().err
        assert transformers_logging.is_progress_bar_enabled() == wanted
    finally:
        (transformers_logging.enable_progress_bar if before else transformers_logging.disable_progress_bar)()
    assert shown.count("\n") == (1 if terminal and wanted else 0)
    assert ("Loading weights: 100%" in shown) == (terminal and wanted)


def test_loaded_model_says_what_the_engine_needs(bench: Workbench) -> None:
    loaded = open_model(str(bench.folder("llama")), dtype="auto", device=CPU).load()
    assert (loaded.model.dtype, loaded.vocab_size, loaded.tokenizer) == (torch.float32, VOCAB_SIZE, None)
    assert loaded.end_token_ids == frozenset(loaded.model.config.eos_token_id)

"""Folders that cannot be served are refused by name, with reason and alternative, before any weight file is opened."""

from __future__ import annotations

import fnmatch
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from flexgen_helm.errors import CorruptFile, FlexGenError, UnsupportedModel
from flexgen_helm.loading.refusals import refuse_config
from flexgen_helm.loading.source import LoadedModel, open_model
from tests.weight_files import opened_weight_files
from tests.workbench import Workbench

Change = Callable[[Path], object]
SECONDS = 10.0
"""What a refusal may take at most."""
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
}


def load(name: str | Path) -> LoadedModel:
    return open_model(str(name), dtype="float32", device=torch.device("cpu")).load()


def with_fields(**fields: Any) -> Change:
    """Sets fields of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def with_config(config: PreTrainedConfig) -> Change:
    return config.save_pretrained


def with_file(name: str, content: Any = None) -> Change:
    """Adds a file: JSON, or some bytes."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(b"\x80\x04" * 8 if content is None else json.dumps(content).encode())

    return change


def with_file_of(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def only(name: str) -> Change:
    """Leaves a weight file of another format where the safetensors file was."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with_file(name)(folder)

    return change


def without(name: str, *changes: Change) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        for other in changes:
            other(folder)

    return change


def quantised(**settings: Any) -> Change:
    return with_fields(quantization_config=settings)


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base-7b"}
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "T5": (with_config(T5Config()), ("t5", "encoder-decoder", "decoder-only")),
    "BART to BART": (with_config(CONFIG_MAPPING["bart"]()), ("bart", "encoder-decoder", "decoder-only")),
    "Whisper": (with_config(CONFIG_MAPPING["whisper"]()), ("whisper", "encoder-decoder", "decoder-only")),
    "BERT": (with_config(BertConfig()), ("bert", "is_decoder is false", "causal language model")),
    "Reformer": (with_config(CONFIG_MAPPING["reformer"]()), ("reformer", "is_decoder is false", "causal language model")),
    "XLM": (with_config(CONFIG_MAPPING["xlm"]()), ("xlm", "causal is false", "causal language model")),
    "XLNet": (with_config(CONFIG_MAPPING["xlnet"]()), ("xlnet", "any order", "causal language model")),
    "image classifier": (with_config(CONFIG_MAPPING["vit"]()), ("vit", "not among", "AutoModelForCausalLM")),
    "classifier": (
        with_fields(architectures=["LlamaForSequenceClassification"]),
        ("LlamaForSequenceClassification", "no trained head", "Give the language model"),
    ),
    "classifier, as text": (with_fields(architectures="LlamaForTokenClassification"), ("ForTokenClassification", "Give the")),
    "question answering": (with_fields(architectures=["LlamaForQuestionAnswering"]), ("LlamaForQuestionAnswering", "Give the")),
    "multiple choice": (with_fields(architectures=["OwnForMultipleChoice"]), ("OwnForMultipleChoice", "Give the")),
    "reward model": (with_fields(architectures=["OwnForRewardModel"]), ("OwnForRewardModel", "no trained head", "Give the")),
    "tied classifier": (
        with_fields(architectures=["LlamaForSequenceClassification"], tie_word_embeddings=True),
        ("LlamaForSequenceClassification", "no trained head"),
    ),
    "GPTQ": (quantised(quant_method="gptq", bits=4), ("already quantised", "gptq, 4 bits", "16-bit")),
    "AWQ": (quantised(quant_method="awq", w_bit=4), ("already quantised", "awq, 4 bits", "16-bit")),
    "bitsandbytes": (quantised(load_in_4bit=True), ("already quantised", "bitsandbytes", "16-bit")),
    "compressed-tensors": (quantised(quant_method="compressed-tensors"), ("compressed-tensors", "16-bit")),
    "FP8": (quantised(quant_method="fp8"), (r"\(fp8", "16-bit", r"FineGrainedFP8Config\(dequantize=True\)")),
    "MXFP4": (quantised(quant_method="mxfp4"), ("mxfp4", "16-bit", r"Mxfp4Config\(dequantize=True\)")),
    "old compressed-tensors": (with_fields(compression_config={"quant_method": "sparseml"}), ("compression_config", "16-bit")),
    "old GPTQ": (with_file("quantize_config.json", {"bits": 4}), ("GPTQ", "quantize_config.json", "16-bit")),
    "old AWQ": (with_file("quant_config.json", {"w_bit": 4}), ("AWQ", "quant_config.json", "16-bit")),
    "ModelOpt": (with_file("hf_quant_config.json", {}), ("ModelOpt", "hf_quant_config.json", "16-bit")),
    "GGUF folder": (without("config.json", only("model-q4.gguf")), ("GGUF", "model-q4.gguf", "safetensors")),
    "GGUF folder with a config": (only("model-q4.gguf"), ("GGUF", "model-q4.gguf", "safetensors")),
    "adapter": (
        without("config.json", with_file("adapter_config.json", ADAPTER)),
        ("LoRA", "org/base-7b", r"merge_and_unload\(\)\.save_pretrained"),
    ),
    "adapter with a config": (
        without("model.safetensors", with_file("adapter_config.json", ADAPTER)),
        ("LoRA", "org/base-7b", r"merge_and_unload\(\)\.save_pretrained"),
    ),
    "adapter in a model folder": (with_file("adapter_config.json", ADAPTER), ("LoRA", "org/base-7b", "merge_and_unload")),
    "own code": (
        with_fields(model_type="brand_new", auto_map={"AutoModelForCausalLM": "modeling_brand_new.Model"}),
        ("brand_new", "trust_remote_code", "upgrade transformers"),
    ),
    "unknown type": (with_fields(model_type="brand_new"), ("brand_new", "does not know", "Upgrade transformers")),
    "no type": (with_fields(model_type=None), ("None", "does not know")),
    "wrong field": (with_fields(num_hidden_layers="two"), ("num_hidden_layers", "Correct the file")),
    "tokenizer's own code": (
        with_file(
            "tokenizer_config.json",
            {"tokenizer_class": "NewTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_new.NewTokenizer", None]}},
        ),
        ("tokenizer", "trust_remote_code", "tokenizer.json"),
    ),
    "unknown activation": (with_fields(hidden_act="newact"), ("hidden_act='newact'", "cannot make", "Correct")),
    "generation config": (
        with_file("generation_config.json", {"early_stopping": "sometimes"}),
        ("early_stopping", "Correct the field"),
    ),
    "pickle": (only("pytorch_model.bin"), ("pytorch_model.bin", "run code", r"save_pretrained\(new_folder\)")),
    "pickled shards": (only("pytorch_model-00001-of-00002.bin"), ("pytorch_model-00001-of-00002.bin", "save_pretrained")),
    "raw PyTorch": (only("consolidated.00.pth"), ("consolidated.00.pth", "run code", "save_pretrained")),
    "TensorFlow": (only("tf_model.h5"), ("tf_model.h5", "run code", "save_pretrained")),
    "Flax": (only("flax_model.msgpack"), ("flax_model.msgpack", "run code", "save_pretrained")),
    "weights of another name": (with_fields(transformers_weights="x.safetensors"), ("x.safetensors", "Rename")),
}
"""What is done to a model folder, and what the message must hold, as regular expressions."""
BROKEN: dict[str, tuple[Change, type[FlexGenError], tuple[str, ...]]] = {
    "no config": (without("config.json"), FlexGenError, ("no config.json", "Give the folder")),
    "torn config": (with_file("config.json"), CorruptFile, ("config.json", "JSON", "Fetch that file again")),
    "config that is a list": (with_file("config.json", [1]), CorruptFile, ("config.json", "object", "Fetch that file again")),
    "torn adapter config": (with_file("adapter_config.json"), CorruptFile, ("adapter_config.json", "Fetch that file again")),
    "torn generation config": (with_file("generation_config.json"), CorruptFile, ("generation_config.json", "Fetch that file")),
    "SentencePiece alone": (
        with_file_of("tokenizer.model", b"\n\x0e\n\x05<unk>"),
        FlexGenError,
        ("tokenizer.model", "sentencepiece", "pip install sentencepiece protobuf"),
    ),
    "no weights": (without("model.safetensors"), CorruptFile, ("no .safetensors files", "Fetch it again")),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder whose weights cannot be read: whoever tries gets another error than the refusal."""
    LlamaConfig(**SMALL).save_pretrained(tmp_path / "some-model")
    (tmp_path / "some-model" / "model.safetensors").write_bytes(b"garbage" * 100)
    return tmp_path / "some-model"


def refusal(name: str | Path, error: type[FlexGenError]) -> str:
    """Returns the message, once it is sure that it came quickly and that no weight file was opened."""
    begin = time.process_time()  # whatever else the machine does
    with opened_weight_files() as opened, pytest.raises(error) as caught:
        load(name)
    assert type(caught.value) is error
    assert opened == []
    assert time.process_time() - begin < SECONDS
    return str(caught.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_refusal_names_model_reason_and_alternative(folder: Path, kind: str) -> None:
    change, words = REFUSED[kind]
    change(folder)
    message = refusal(folder, UnsupportedModel)
    for word in ("some-model", *words):
        assert re.search(word, message), message


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folder_is_named_with_what_to_do(folder: Path, kind: str) -> None:
    change, error, words = BROKEN[kind]
    change(folder)
    message = refusal(folder, error)
    for word in ("some-model", *words):
        assert word in message


def test_path_of_a_file(tmp_path: Path) -> None:
    for name in ("model-q4.gguf", "model.safetensors"):
        with_file(name)(tmp_path)
    assert "16-bit safetensors checkpoint" in refusal(tmp_path / "model-q4.gguf", UnsupportedModel)
    assert "Give the folder" in refusal(tmp_path / "model.safetensors", FlexGenError)
    assert "16-bit safetensors checkpoint" in refusal("org/model/model-q4.gguf", UnsupportedModel)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere", "~/nowhere", "a/b/c"])
def test_missing_folder_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *names, **options: pytest.fail("asked the hub"))
    assert "existing model folder" in refusal(name, FlexGenError)


def test_counter_sees_what_a_good_model_opens(bench: Workbench) -> None:
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with opened_weight_files() as opened:
            read(bench.folder("llama"))
        assert {Path(path).name for path in opened} == {"model.safetensors"}


def test_library_code_runs_where_a_known_type_brings_its_own(
    bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(bench.folder("llama"), tmp_path / "model"))
    with_fields(auto_map={"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"})(folder)
    (folder / "modeling_own.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with caplog.at_level(logging.INFO, logger="flexgen_helm"):
        loaded = load(folder)
    assert type(loaded.model).__module__.startswith("transformers.")
    assert sum("its own modelling code is not run" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    "named", [None, [], ["LlamaModel"], ["OwnLlamaForCausalLM"], ["RoFormerModel"], ["LlamaForRewardModel", "LlamaForCausalLM"]]
)
def test_other_names_are_left_to_the_weights(named: list[str] | None) -> None:
    refuse_config("org/model", LlamaConfig(**SMALL, architectures=named))


def test_no_name_of_a_language_model_is_taken_for_another_task() -> None:
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    for each in names:
        refuse_config("org/model", LlamaConfig(**SMALL, architectures=[each] if isinstance(each, str) else list(each)))


def test_every_classifier_of_transformers_is_another_task() -> None:
    for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        if name.endswith("ForSequenceClassification"):
            with pytest.raises(UnsupportedModel, match=name):
                refuse_config("org/model", LlamaConfig(**SMALL, architectures=[name]))


def test_advice_for_the_file_of_tiktoken_is_tiktoken(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    message = refusal(folder, CorruptFile)
    assert "tiktoken" in message
    assert "sentencepiece" not in message


def decoder_config(kind: str) -> PreTrainedConfig:
    config = CONFIG_MAPPING[kind](**SMALL)
    config.is_encoder_decoder = False
    return config


@torch.no_grad()
def looks_ahead(config: PreTrainedConfig) -> bool:
    """Returns whether the library's model lets a token see those after it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    first = torch.randint(3, 60, (1, 16))
    other = first.clone()
    other[0, -1] += 1
    difference = model(input_ids=first).logits[:, :-1] - model(input_ids=other).logits[:, :-1]
    return float(difference.abs().max()) > 1e-5


def may_be_encoder(kind: str) -> bool:
    default = CONFIG_MAPPING[kind]
    return kind == "xlm" or default.is_encoder_decoder or getattr(default, "is_decoder", None) is False


UNBUILT = {"prophetnet", "reformer", "xlnet", "xmod"}
"""Types that need other fields than the rest, or are told to be decoders before they can be made."""
ENCODERS = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if may_be_encoder(kind) and kind not in UNBUILT]


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_refused_and_decoders_of_the_same_kind_are_not(kind: str) -> None:
    config = decoder_config(kind)
    if looks_ahead(config):
        with pytest.raises(UnsupportedModel, match=rf"{kind}\) is an encoder"):
            refuse_config("org/model", config)
        config.is_decoder = config.causal = True
        assert not looks_ahead(config)
    refuse_config("org/model", config)


def test_encoders_of_every_sort_are_tried() -> None:
    assert {"bert", "roberta", "electra", "xlm", "bart", "marian", "trocr", "gpt_neox"} <= set(ENCODERS)


class Hub:
    """Stands in for the model hub: copies what matches the patterns from a folder."""

    def __init__(self, remote: Path, local: Path) -> None:
        self._remote, self._local = remote, local
        self.fetched: list[str] = []

    def download(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if name != "org/model":
            raise ValueError("no such repository")
        self._local.mkdir(exist_ok=True)
        for file in self._remote.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self._local)
                self.fetched.append(file.name)
        return str(self._local)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(folder, tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


@pytest.mark.parametrize("kind", ["T5", "BERT", "GPTQ", "old GPTQ", "adapter", "own code", "tokenizer's own code"])
def test_hub_model_is_refused_before_its_weights_are_fetched(hub: Hub, folder: Path, kind: str) -> None:
    change, words = REFUSED[kind]
    change(folder)
    message = refusal("org/model", UnsupportedModel)
    for word in ("org/model", *words):
        assert re.search(word, message), message
    assert hub.fetched
    assert not [file for file in hub.fetched if file.endswith(".safetensors")]


def test_hub_model_without_safetensors(hub: Hub, folder: Path) -> None:
    only("pytorch_model.bin")(folder)
    refusal("org/model", CorruptFile)
    assert "pytorch_model.bin" not in hub.fetched


def test_only_the_weights_of_the_model_are_fetched(hub: Hub, bench: Workbench, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(bench.folder("mistral"), folder)
    shards = {file.name for file in folder.glob("model-*.safetensors")}
    for other in ("consolidated.safetensors", "model-q4.gguf", "pytorch_model.bin"):
        with_file(other)(folder)
    assert load("org/model").name == "org/model"
    assert len(shards) > 2
    assert {file for file in hub.fetched if not file.endswith(".json")} == shards


def test_unknown_hub_model(hub: Hub) -> None:
    message = refusal("org/other", FlexGenError)
    assert all(part in message for part in ("org/other", "no such repository", "Check the name"))

"""Names, folders and YAML files from which HELM gets a deployment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.config_registry import register_configs_from_directory
from helm.benchmark.model_deployment_registry import (
    ClientSpec,
    ModelDeployment,
    WindowServiceSpec,
    get_model_deployment,
    register_model_deployment,
)
from helm.benchmark.model_metadata_registry import get_model_metadata
from helm.benchmark.runner import Runner, RunnerError
from helm.benchmark.tokenizer_config_registry import get_tokenizer_config
from helm.benchmark.window_services.default_window_service import DefaultWindowService
from helm.benchmark.window_services.local_window_service import LocalWindowService
from helm.benchmark.window_services.tokenizer_service import TokenizerService
from helm.benchmark.window_services.window_service import WindowService
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory
from helm.common.local_context import LocalContext
from helm.common.tokenization_request import TokenizationRequest
from helm.proxy.retry import NonRetriableException
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from flexgen_helm import plugin
from flexgen_helm.compression.config import CompressionConfig
from flexgen_helm.errors import FlexGenError, InvalidJob, UnsupportedModel
from flexgen_helm.helm.deployment import CLIENT, DeploymentError, ModelName, split_name
from flexgen_helm.helm.model_files import read_limits
from flexgen_helm.helm.runner import FlexGenRunner
from flexgen_helm.helm.tokenizer import FlexGenTokenizer
from flexgen_helm.loading.source import open_without_weights
from flexgen_helm.loading.tokenizer_files import read_tokenizer
from flexgen_helm.model.context_length import DEFAULT_CONTEXT, context_of
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeLoader, run_spec
from tests.tokenizers import save_pair_tokenizer

W4 = CompressionConfig(bits=4.5)
LONGROPE = {"model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with a config and a tokenizer that adds a BOS token; weights are not needed."""
    return make_folder(tmp_path / "org" / "model", {"max_position_embeddings": 40})


def make_folder(folder: Path, config: dict[str, Any], *, adds_bos: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_pair_tokenizer(folder, adds_bos=adds_bos)
    return folder


def window_service(deployment: str, folder: Path) -> WindowService:
    return WindowServiceFactory.get_window_service(deployment, TokenizerService(LocalContext(str(folder))))


def test_plugin_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import flexgen_helm.plugin"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    modules = {line.rsplit("|", 1)[-1].strip() for line in lines}
    assert "flexgen_helm.plugin" in modules
    assert not {"torch", "transformers", "flexgen_helm.runtime.engine"} & modules


def test_helm_run_finds_the_plugin() -> None:
    assert "flexgen_helm.plugin" in {entry.value for entry in entry_points(group="helm")}


def test_folder_name_becomes_a_deployment(model_folder: Path) -> None:
    name = f"flexgen/{model_folder}"
    deployment = get_model_deployment(name)
    assert (deployment.name, deployment.model_name) == (name, "org/model")
    assert deployment.client_spec.class_name == CLIENT
    assert deployment.client_spec.args == {"name_or_path": str(model_folder)}
    # One token of the context is the BOS token's, which HELM does not count.
    assert deployment.max_sequence_length == 39
    assert get_model_deployment(name) is deployment
    metadata = get_model_metadata("org/model")
    assert (metadata.creator_organization_name, metadata.display_name) == ("org", "model")
    assert name in (metadata.deployment_names or [])


def test_tokenizer_is_the_models_own(model_folder: Path, tmp_path: Path) -> None:
    name = f"flexgen/{model_folder}"
    config = get_tokenizer_config(get_model_deployment(name).tokenizer_name or "")
    assert config is not None
    assert (config.prefix_token, config.end_of_text_token) == ("<s>", "</s>")
    assert get_tokenizer_config(config.name) is config
    service = window_service(name, tmp_path)
    assert service.tokenize("aaabba") == ["aa", "ab", "ba"]
    assert service.get_num_tokens("aaab") == 2
    # 39 tokens fit: 30 of the prompt and 9 new ones.
    assert service.truncate_from_right("aa" * 50, 9) == "aa" * 30
    assert not list(tmp_path.glob("**/*.sqlite"))


def test_tokenizer_without_bos_leaves_the_whole_context(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", {"model_type": "gpt2", "n_positions": 64}, adds_bos=False)
    assert read_limits(str(folder)).window == 64


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 100}}, 100),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.0}}, 100),
        ({**LONGROPE, "rope_scaling": {"type": "longrope", **FACTORS}}, 4096),
        ({**LONGROPE, "rope_scaling": {"type": "yarn", **FACTORS}}, 4096),
        ({"max_position_embeddings": 8192, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({"model_type": "roberta", "is_decoder": True, "max_position_embeddings": 100, "pad_token_id": 1}, 98),
        # What a config.json leaves out is the default of its class.
        ({"model_type": "gemma3_text"}, 131072),
        ({"model_type": "qwen3"}, 32768),
        ({"model_type": "gpt2"}, 1024),
        ({"model_type": "mamba"}, DEFAULT_CONTEXT),
    ],
)
def test_context_is_what_the_engine_can_serve(config: dict[str, Any], context: int, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", config, adds_bos=False)
    assert read_limits(str(folder)).context == context
    source = open_without_weights(str(folder))
    assert context_of(source.empty, source.config)[0] == context


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("flexgen/org/model", ModelName("org/model")),
        ("flexgen/org/model@w4", ModelName("org/model", compression=W4)),
        ("flexgen/org/model#v1", ModelName("org/model", "v1")),
        ("flexgen/org/model#v1@w4", ModelName("org/model", "v1", W4)),
        ("flexgen/org/model#refs/pr/1@w4", ModelName("org/model", "refs/pr/1", W4)),
        ("flexgen//abs/path/model", ModelName("/abs/path/model")),
        ("flexgen//abs/path/model@w4", ModelName("/abs/path/model", compression=W4)),
        ("flexgen//abs/@path/model@w4", ModelName("/abs/@path/model", compression=W4)),
        ("flexgen//abs/model#1", ModelName("/abs/model#1")),
        ("flexgen//model", ModelName("/model")),
        ("flexgen/gpt2", ModelName("gpt2")),
    ],
)
def test_name_is_a_hub_name_or_an_absolute_path(name: str, model: ModelName) -> None:
    assert split_name(name) == model
    assert model.deployment() == name


@pytest.mark.parametrize(
    "name", ["flexgen/", "flexgen/org/sub/model", "flexgen/org/", "flexgen/org/@w4", "flexgen/@w4", "flexgen/org/#v1"]
)
def test_other_names_are_refused_with_the_grammar(name: str) -> None:
    with pytest.raises(DeploymentError, match="flexgen/<organization>/<model>"):
        get_model_deployment(name)


def test_missing_folder_and_broken_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"no config\.json"):
        get_model_deployment(f"flexgen/{tmp_path}/none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DeploymentError, match="not valid JSON"):
        get_model_deployment(f"flexgen/{tmp_path}")


def test_a_model_that_is_refused_is_refused_when_its_run_entries_are_due(tmp_path: Path) -> None:
    """Not when helm-run reads its list of models, which would take the others' run entries with it."""
    folder = make_folder(tmp_path / "encoder", {"model_type": "bert"})
    assert get_model_deployment(f"flexgen/{folder}").max_sequence_length is None
    with pytest.raises(UnsupportedModel, match="is_decoder is false"):
        window_service(f"flexgen/{folder}", tmp_path)


def test_hub_model_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DeploymentError, match="`no-such-organization/no-such-model`"):
        get_model_deployment("flexgen/no-such-organization/no-such-model")


def test_hub_model_is_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "snapshot", {"max_position_embeddings": 50})
    asked: list[tuple[str, str | None]] = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert not any("safetensors" in pattern or pattern == "*" for pattern in allow_patterns)
        asked.append((repo_id, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read_limits("org/model", "v1").window == 49
    assert set(asked) == {("org/model", "v1")}


def test_yaml_deployment_needs_only_a_name_and_arguments(model_folder: Path, tmp_path: Path) -> None:
    local_path = tmp_path / "prod_env"
    local_path.mkdir()
    (local_path / "model_deployments.yaml").write_text(
        f"""
model_deployments:
  - name: flexgen/written/deployment
    model_name: written/model
    client_spec:
      class_name: {CLIENT}
      args: {{name_or_path: {model_folder}, dtype: bfloat16, policy: {{gpu_batch_size: 32}}}}
  - name: flexgen/written/limited
    max_sequence_length: 20
    client_spec: {{class_name: {CLIENT}, args: {{name_or_path: {os.path.relpath(model_folder)}}}}}
"""
    )
    register_configs_from_directory(str(local_path))
    plugin.complete_written_deployments()
    deployment = get_model_deployment("flexgen/written/deployment")
    assert deployment.model_name == "written/model"
    assert deployment.client_spec.args["dtype"] == "bfloat16"
    service = window_service(deployment.name, tmp_path)
    assert (service.max_request_length, service.prefix_token) == (39, "<s>")
    assert service.tokenize("aaab") == ["aa", "ab"]
    limited = get_model_deployment("flexgen/written/limited")
    assert limited.model_name == "written/limited"
    assert window_service(limited.name, tmp_path).max_request_length == 20


def test_completed_deployment_keeps_what_was_written(model_folder: Path) -> None:
    written = ModelDeployment(
        "flexgen/a/b",
        ClientSpec(CLIENT, {"name_or_path": str(model_folder)}),
        tokenizer_name="simple/tokenizer1",
    )
    assert plugin.complete(written).tokenizer_name == "simple/tokenizer1"
    with_revision = ModelDeployment("flexgen/a/b", ClientSpec(CLIENT, {"name_or_path": "o/m", "revision": "v1"}))
    assert plugin.complete(with_revision).tokenizer_name == "flexgen/o/m#v1"


def test_completion_that_fills_the_context_is_refused(model_folder: Path, tmp_path: Path) -> None:
    service = window_service(f"flexgen/{model_folder}", tmp_path)
    assert service.fits_within_context_window("aa", 38)
    for call in (service.fits_within_context_window, service.truncate_from_right):
        with pytest.raises(InvalidJob, match="completions of 39 tokens"):
            call("aa", 39)


def test_a_written_window_service_of_helm_is_replaced_and_one_of_the_users_is_not(model_folder: Path, tmp_path: Path) -> None:
    """HELM's own would go on for ever where ours refuses."""
    client = ClientSpec(CLIENT, {"name_or_path": str(model_folder)})
    for kind in (DefaultWindowService, LocalWindowService):
        spec = WindowServiceSpec(f"{kind.__module__}.{kind.__name__}", {"max_sequence_length": 20})
        register_model_deployment(plugin.complete(ModelDeployment("flexgen/written/window", client, window_service_spec=spec)))
        service = window_service("flexgen/written/window", tmp_path)
        assert service.max_request_length == 20
        with pytest.raises(InvalidJob, match="completions of 20 tokens"):
            service.truncate_from_right("aa", 20)
    users = WindowServiceSpec("their.module.WindowService")
    assert plugin.complete(ModelDeployment("flexgen/a/b", client, window_service_spec=users)).window_service_spec is users


@pytest.mark.parametrize("written", [{}, {"max_request_length": 41}, {"max_sequence_and_generated_tokens_length": 4096}])
def test_written_lengths_beyond_the_context_are_cut_to_it(written: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    """HELM's files have one token more than the context for models that it asks elsewhere."""
    deployment = ModelDeployment(
        "flexgen/written/lengths", ClientSpec(CLIENT, {"name_or_path": str(model_folder)}), max_sequence_length=40, **written
    )
    register_model_deployment(plugin.complete(deployment))
    service = window_service(deployment.name, tmp_path)
    # Of the 40 tokens one is BOS, which HELM does not count; in a first window it does.
    assert (service.max_request_length, service.max_sequence_length) == (39, 38)


@pytest.mark.parametrize("name", ["max_sequence_length", "max_request_length", "max_sequence_and_generated_tokens_length"])
@pytest.mark.parametrize("length", [0, -5])
def test_written_lengths_without_room_are_refused(name: str, length: int, model_folder: Path, tmp_path: Path) -> None:
    client = ClientSpec(CLIENT, {"name_or_path": str(model_folder)})
    lengths: dict[str, Any] = {"max_sequence_length": 10, name: length}
    written = ModelDeployment("flexgen/written/empty", client, **lengths)
    register_model_deployment(plugin.complete(written))
    with pytest.raises(DeploymentError, match=f"`{name}: {length}` of the deployment"):
        window_service(written.name, tmp_path)


@pytest.mark.parametrize(
    ("special", "prefix"), [({"bos_token": "<s>", "eos_token": "</s>"}, "<s>"), ({"eos_token": "</s>"}, "</s>"), ({}, "")]
)
def test_documents_begin_with_bos_or_with_what_separates_them(special: dict[str, str], prefix: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", {"max_position_embeddings": 40}, adds_bos=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    service = window_service(f"flexgen/{folder}", tmp_path)
    assert service.prefix_token == prefix
    assert (service.max_request_length, service.max_sequence_length) == (40, 40 - bool(prefix))


@pytest.mark.parametrize(
    ("template", "prefix", "room"),
    [
        ("</s> $A", "</s>", (39, 38)),
        ("</s> <s> $A", "", (38, 38)),
        ("$A </s>", "<s>", (40, 39)),
        ("<s> $A </s>", "<s>", (39, 38)),
    ],
)
def test_windows_leave_room_for_what_the_tokenizer_puts_before_a_text(
    template: str, prefix: str, room: tuple[int, int], tmp_path: Path
) -> None:
    """A document begins with it; where it is of several tokens the engine adds it, because HELM can leave out one alone."""
    folder = make_folder(tmp_path / "model", {"max_position_embeddings": 40}, adds_bos=False)
    save_pair_tokenizer(folder, template=template)
    service = window_service(f"flexgen/{folder}", tmp_path)
    assert (service.prefix_token, service.max_request_length, service.max_sequence_length) == (prefix, *room)


def test_text_that_no_tokenizer_reads_fails_at_once(model_folder: Path, tmp_path: Path) -> None:
    service = window_service(f"flexgen/{model_folder}", tmp_path)
    begin = time.monotonic()
    with pytest.raises(NonRetriableException, match="half of a surrogate pair"):
        service.tokenize("aa\ud800")
    assert time.monotonic() - begin < 60  # HELM repeats for 150 seconds


def test_what_else_a_tokenizer_refuses_is_told_as_it_is(model_folder: Path, tmp_path: Path) -> None:
    config = get_tokenizer_config(get_model_deployment(f"flexgen/{model_folder}").tokenizer_name or "")
    assert config is not None
    tokenizer = FlexGenTokenizer(config.name, str(model_folder))
    with pytest.raises(NonRetriableException, match=r"expects tokenizer to be (?!.*surrogate)"):
        tokenizer.tokenize(TokenizationRequest("aa", tokenizer="another/model"))


def test_helm_splits_a_text_as_the_engine_does(model_folder: Path) -> None:
    """Where the class that is named beside tokenizer.json would split it in its own way."""
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (model_folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 320}))
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, engine = FlexGenTokenizer("org/split", str(model_folder)), read_tokenizer("org/split", model_folder)
    request = TokenizationRequest("aaab<s>ac", tokenizer="org/split", encode=True)
    written = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    assert engine is not None
    ids = written.encode("aaab<s>ac", add_special_tokens=False).ids
    assert AutoTokenizer.from_pretrained(model_folder).encode("aaab<s>ac", add_special_tokens=False) != ids
    assert engine.encode("aaab<s>ac", add_special_tokens=False) == ids
    assert [token.value for token in tokenizer.tokenize(request).tokens] == ids


@pytest.mark.parametrize(
    ("file", "content", "message"), [("tokenizer.json", "{", "tokenizer.json cannot be read"), (None, "", "has no tokenizer")]
)
def test_tokenizer_that_cannot_be_read_is_no_reason_to_try_again(
    model_folder: Path, file: str | None, content: str, message: str
) -> None:
    if file is None:
        for each in ("tokenizer.json", "tokenizer_config.json"):
            (model_folder / each).unlink()
    else:
        (model_folder / file).write_text(content)
    tokenizer = FlexGenTokenizer(f"org/{file}", str(model_folder))
    with pytest.raises(NonRetriableException, match=message):
        tokenizer.tokenize(TokenizationRequest("aa", tokenizer=f"org/{file}"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"])
def test_link_to_a_file_that_was_not_fetched_is_named(model_folder: Path, file: str) -> None:
    (model_folder / file).unlink(missing_ok=True)
    (model_folder / file).symlink_to(model_folder / "nowhere")
    with pytest.raises(FlexGenError, match=file.replace(".", r"\.")):
        get_model_deployment(f"flexgen/{model_folder}")


@pytest.mark.parametrize("runner", [Runner, FlexGenRunner])
def test_run_that_helm_would_never_end_fails_at_once(
    runner: type[Runner], model_folder: Path, run_suite: RunSuite, loader: FakeLoader, caplog: pytest.LogCaptureFixture
) -> None:
    spec = run_spec(deployment=f"flexgen/{model_folder}", max_tokens=4096)
    begin = time.monotonic()
    with caplog.at_level("INFO", logger="helm"), pytest.raises(RunnerError, match="generation"):
        run_suite([spec], runner)
    assert time.monotonic() - begin < 60
    assert "completions of 4096 tokens" in caplog.text
    assert loader.attempts == 0

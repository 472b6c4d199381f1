"""Compressed variants by name: what HELM makes of `model@w4`, from a run entry to `Engine.from_pretrained`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm.benchmark.config_registry import register_configs_from_directory
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, get_model_deployment
from helm.benchmark.model_metadata_registry import get_model_metadata
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.run_spec_factory import construct_run_specs
from helm.benchmark.runner import Runner, RunnerError
from helm.benchmark.scenarios.scenario import ScenarioSpec
from helm.benchmark.window_services.tokenizer_service import TokenizerService
from helm.benchmark.window_services.window_service_factory import WindowServiceFactory
from helm.common.local_context import LocalContext
from helm.common.object_spec import parse_object_spec

from flexgen_helm import plugin
from flexgen_helm.errors import CompressionError, FlexGenError
from flexgen_helm.helm.deployment import CLIENT, DeploymentError, parse_arguments
from flexgen_helm.helm.run_record import RUN_FILE, WORKLOAD_FILE
from flexgen_helm.helm.runner import FlexGenRunner
from flexgen_helm.helm.written import check_deployment
from flexgen_helm.runtime.engine import Engine
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeEngine, FakeLoader
from tests.tokenizers import save_character_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a config and a tokenizer for any text; weights are not needed."""
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    save_character_tokenizer(folder)
    return folder


def entry(deployment: str) -> RunSpec:
    """The run that HELM makes of a run entry, with three words in place of its data."""
    (spec,) = construct_run_specs(parse_object_spec(f"dyck_language:num_parenthesis_pairs=2,model={deployment}"))
    adapter = replace(spec.adapter_spec, max_eval_instances=3)
    return replace(spec, scenario_spec=ScenarioSpec("tests.helm.fakes.WordsScenario"), adapter_spec=adapter)


def write(folder: Path, **deployment: Any) -> None:
    """Writes a deployment as a user would, and has it read as helm-run does."""
    folder.mkdir(exist_ok=True)
    (folder / "model_deployments.yaml").write_text(yaml.safe_dump({"model_deployments": [deployment]}))
    register_configs_from_directory(str(folder))
    plugin.complete_written_deployments()


def test_each_variant_is_a_model_of_its_own(folder: Path) -> None:
    plain, compressed = (get_model_deployment(f"flexgen/{folder}{suffix}") for suffix in ("", "@w4"))
    assert (plain.model_name, compressed.model_name) == ("org/model", "org/model@w4")
    assert plain.client_spec.args == {"name_or_path": str(folder)}
    assert compressed.client_spec.args == {"name_or_path": str(folder), "compression": "w4"}
    metadata = get_model_metadata("org/model@w4")
    assert (metadata.creator_organization_name, metadata.display_name) == ("org", "model (4-bit weights)")
    assert compressed.name in (metadata.deployment_names or [])
    assert entry(compressed.name).name == "dyck_language_np=2:model=org_model@w4"


def test_variants_share_tokenizer_and_window(folder: Path, tmp_path: Path) -> None:
    plain, compressed = (get_model_deployment(f"flexgen/{folder}{suffix}") for suffix in ("", "@w3.25-entropy"))
    assert compressed.tokenizer_name == plain.tokenizer_name == f"flexgen/{folder}"
    assert compressed.window_service_spec == plain.window_service_spec
    assert compressed.max_sequence_length == plain.max_sequence_length
    service = WindowServiceFactory.get_window_service(compressed.name, TokenizerService(LocalContext(str(tmp_path))))
    assert service.get_num_tokens("abc") == 3


def test_the_variant_reaches_the_engine(
    folder: Path, tmp_path: Path, run_suite: RunSuite, monkeypatch: pytest.MonkeyPatch, close_engine: None
) -> None:
    asked: list[dict[str, Any]] = []

    def from_pretrained(**arguments: Any) -> FakeEngine:
        assert len(arguments.pop("workload")) == 3
        asked.append(arguments)
        return FakeEngine(arguments)

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    suite = run_suite([entry(f"flexgen/{folder}{suffix}") for suffix in ("", "@w4", "@w4-minmax")])
    assert asked == [
        {"name_or_path": str(folder)},
        {"name_or_path": str(folder), "compression": "w4"},
        {"name_or_path": str(folder), "compression": "w4-minmax"},
    ]
    runs = {path.name.partition("model=")[2]: path for path in suite.glob("dyck*")}
    assert set(runs) == {"org_model", "org_model@w4", "org_model@w4-minmax"}
    reports = {name: json.loads((path / RUN_FILE).read_text()) for name, path in runs.items()}
    assert {name: report["variant"] for name, report in reports.items()} == {
        "org_model": None,
        "org_model@w4": "w4",
        "org_model@w4-minmax": "w4-minmax",
    }
    assert {report["model"] for report in reports.values()} == {str(folder)}
    # No variant was given the answers of another, which have the same prompts.
    assert [report["requests"] for report in reports.values()] == [{"total": 3, "computed": 3}] * 3
    deployments = [served["deployment"] for served in json.loads((suite / WORKLOAD_FILE).read_text())]
    assert deployments == [f"flexgen/{folder}{suffix}" for suffix in ("", "@w4", "@w4-minmax")]


@pytest.mark.parametrize("runner", [Runner, FlexGenRunner])
def test_answers_are_cached_by_variant(folder: Path, run_suite: RunSuite, loader: FakeLoader, runner: type[Runner]) -> None:
    """With HELM's runner too, which asks the client."""
    for suffix in ("", "@w4", "@w4"):
        run_suite([entry(f"flexgen/{folder}{suffix}")], runner)
    counts = [sum(map(len, engine.runs)) + len(engine.submitted) for engine in loader.engines]
    assert counts == [3, 3]


@pytest.mark.parametrize(
    ("written", "canonical"), [("w3.5-entropy", "w3-entropy"), ("w4kv16", "w4"), ("w3.250-entropy", None), ("kv16", "")]
)
def test_another_spelling_is_told_the_canonical_one(written: str, canonical: str | None, folder: Path) -> None:
    """HELM names a run by what its entry says."""
    known = f"flexgen/{folder}{'@' if canonical else ''}{canonical}"
    kind, message = (CompressionError, "There are `w2`") if canonical is None else (DeploymentError, f"spelling of `{known}`")
    with pytest.raises(kind, match=message):
        get_model_deployment(f"flexgen/{folder}@{written}")


@pytest.mark.parametrize(("suffix", "message"), [("w5", "no variant `@w5`"), ("main", "no variant")])
def test_what_there_is_not_is_refused_with_what_there_is(suffix: str, message: str, folder: Path) -> None:
    with pytest.raises(CompressionError, match=f"{message}.*There are `w2`, `w3`, `w4`, `w8`"):
        get_model_deployment(f"flexgen/{folder}@{suffix}")


def test_an_existing_folder_of_the_full_name_is_no_variant(folder: Path, tmp_path: Path) -> None:
    renamed = folder.rename(folder.with_name("model@w4"))
    deployment = get_model_deployment(f"flexgen/{renamed}")
    assert deployment.client_spec.args == {"name_or_path": str(renamed)}
    assert deployment.tokenizer_name == f"flexgen/{renamed}"
    service = WindowServiceFactory.get_window_service(deployment.name, TokenizerService(LocalContext(str(tmp_path))))
    assert service.get_num_tokens("abc") == 3
    check_deployment(deployment.name, None)
    assert get_model_deployment(f"flexgen/{renamed}@w8").client_spec.args["compression"] == "w8"


def test_a_revision_of_the_hub_and_a_variant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[str, str | None]] = set()

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.add((repo_id, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    deployment = get_model_deployment("flexgen/org/variants#v1@w4")
    assert deployment.client_spec.args == {"name_or_path": "org/variants", "revision": "v1", "compression": "w4"}
    assert (deployment.model_name, deployment.tokenizer_name) == ("org/variants#v1@w4", "flexgen/org/variants#v1")
    assert asked == {("org/variants", "v1")}


@pytest.mark.parametrize("compression", [{"name_or_path": "@w4"}, {"compression": "w4"}, {"compression": "w4kv16"}])
def test_a_written_deployment_names_a_variant(compression: dict[str, str], folder: Path, tmp_path: Path) -> None:
    arguments = {**compression, "name_or_path": f"{folder}{compression.get('name_or_path', '')}", "dtype": "float32"}
    name = f"flexgen/written/{'-'.join(compression.values())}"
    write(tmp_path / "local", name=name, client_spec={"class_name": CLIENT, "args": arguments})
    check_deployment(name, str(tmp_path / "local"))
    deployment = get_model_deployment(name)
    assert deployment.tokenizer_name == f"flexgen/{folder}"
    assert deployment.window_service_spec is not None
    assert deployment.window_service_spec.args["name_or_path"] == str(folder)
    assert get_model_metadata(deployment.model_name or "").display_name.endswith(" (4-bit weights)")
    assert parse_arguments(deployment.client_spec.args) == {
        "name_or_path": str(folder),
        "dtype": "float32",
        "compression": "w4",
    }


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bad@w4", {}, "the name says `@w4`, but client_spec.args name the variant `None`"),
        ("bad@w4", {"compression": "w8"}, "the name says `@w4`, but client_spec.args name the variant `w8`"),
        ("bad", {"compression": "w5"}, "There is no variant `@w5`"),
        ("bad", {"compression": "w4", "suffix": "@w8"}, "names the variant `w8`, but compression is `w4`"),
        ("bad", {"suffix": "@main"}, "There is no variant `@main`"),
    ],
)
def test_a_written_variant_that_there_is_not_fails_when_it_is_due(
    name: str, arguments: dict[str, str], message: str, folder: Path, tmp_path: Path, run_suite: RunSuite, loader: FakeLoader
) -> None:
    """Not when helm-run starts, which would take the run entries of other models with it."""
    path = f"{folder}{arguments.pop('suffix', '')}"
    client = {"class_name": CLIENT, "args": {"name_or_path": path, **arguments}}
    write(tmp_path / "cache", name=f"flexgen/written/{name}", client_spec=client)
    with pytest.raises(FlexGenError, match=rf"^Deployment `flexgen/written/{name}`: .*{message}"):
        check_deployment(f"flexgen/written/{name}", str(tmp_path / "cache"))
    with pytest.raises(RunnerError, match=rf'Failed runs: \["[^"]*model=written_{name}"\]'):
        run_suite([entry(f"flexgen/written/{name}"), entry(f"flexgen/{folder}")])
    assert loader.engine.arguments == {"name_or_path": str(folder)}


def test_a_name_of_the_users_own_may_have_an_at_sign(folder: Path, tmp_path: Path) -> None:
    client = {"class_name": CLIENT, "args": {"name_or_path": str(folder)}}
    write(tmp_path / "local", name="flexgen/written/mine@home", client_spec=client)
    check_deployment("flexgen/written/mine@home", str(tmp_path / "local"))


def test_the_tokenizer_of_a_variant_that_there_is_not_says_so(folder: Path, tmp_path: Path) -> None:
    """HELM's own runner asks for it before it asks the client."""
    written = ModelDeployment("flexgen/written/unknown", ClientSpec(CLIENT, {"name_or_path": f"{folder}@w5"}))
    with pytest.raises(CompressionError, match="no variant `@w5`"):
        plugin.make_tokenizer_config(plugin.complete(written).tokenizer_name or "")

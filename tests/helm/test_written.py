"""Misspelt keys of a written deployment: named before anything is loaded, in both ways in which HELM reaches the engine."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm.benchmark.config_registry import register_configs_from_directory
from helm.benchmark.runner import Runner, RunnerError

from flexgen_helm import Engine, plugin
from flexgen_helm.helm.deployment import ARGUMENTS, CLIENT, KEYS, DeploymentError
from flexgen_helm.helm.runner import FlexGenRunner
from flexgen_helm.helm.written import check_deployment
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeLoader, run_spec

NAME = "flexgen/written/keys"


def test_the_keys_are_those_of_the_engine() -> None:
    """Except that answers of free shapes depend on their neighbours, so that HELM must not cache them; jobs are HELM's own."""
    keywords = list(inspect.signature(Engine.from_pretrained).parameters)
    keywords.remove("free_shapes")
    keywords.remove("workload")
    assert list(KEYS[ARGUMENTS]) == keywords


def write(folder: Path, name: str = NAME, **keys: Any) -> None:
    """Writes a deployment as a user would, and has it read as helm-run does."""
    folder.mkdir(exist_ok=True)
    arguments = {"name_or_path": "letters", **keys.pop("args", {})}
    window = {"class_name": "tests.helm.fakes.LettersWindowService"}
    written = {
        "name": name,
        "client_spec": {"class_name": CLIENT, "args": arguments, **keys.pop("client_spec", {})},
        "tokenizer_name": "simple/tokenizer1",
        "window_service_spec": window,
        "max_sequence_length": 2048,
        **keys,
    }
    (folder / "model_deployments.yaml").write_text(yaml.safe_dump({"model_deployments": [written]}))
    register_configs_from_directory(str(folder))
    plugin.complete_written_deployments()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"args": {"polcy": {}}}, "client_spec.args has no key `polcy`. Did you mean `policy`[?].*keys.*`max_memory`"),
        ({"args": {"max_memry": {}}}, "client_spec.args has no key `max_memry`. Did you mean `max_memory`[?]"),
        ({"args": {"policy": {"wieghts": [1, 0, 0]}}}, "policy has no key `wieghts`. Did you mean `weights`[?]"),
        (
            {"args": {"gpu_batch_size": 8}},
            "`gpu_batch_size`. Did you mean `gpu_batch_size` of client_spec.args.policy",
        ),
        ({"max_memory": {"host": "1GiB"}}, "deployment has no key `max_memory`. Did you mean `max_memory` of client_spec.args"),
        ({"max_sequence_lenght": 9}, "deployment has no key `max_sequence_lenght`. Did you mean `max_sequence_length`[?]"),
        (
            {"client_spec": {"arguments": {}}},
            "client_spec has no key `arguments`.*client_spec are `class_name`, `args`",
        ),
        ({"zzz": 1}, "deployment has no key `zzz`. Correct or remove it"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write(tmp_path, **keys)
    with pytest.raises(DeploymentError, match=f"^Deployment `{NAME}`: .*{message}"):
        check_deployment(NAME, str(tmp_path))


def test_what_is_written_well_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, args={"policy": {"weights": [0, 1, 0]}, "max_memory": {"host": "1GiB"}})
    check_deployment(NAME, str(tmp_path))
    check_deployment(NAME, str(tmp_path / "nothing"))
    check_deployment("simple/model1", str(tmp_path))


@pytest.mark.parametrize("runner", [FlexGenRunner, Runner])
def test_nothing_is_loaded_and_other_entries_go_on(
    run_suite: RunSuite, loader: FakeLoader, tmp_path: Path, runner: type[Runner], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "cache", max_memry={"host": "1GiB"})
    specs = [run_spec(name="wrong", deployment=NAME), run_spec(name="right")]
    with caplog.at_level("INFO", logger="helm"), pytest.raises(RunnerError, match=r'Failed runs: \["wrong"\]'):
        run_suite(specs, runner)
    assert "has no key `max_memry`. Did you mean `max_memory` of client_spec.args?" in caplog.text
    assert loader.engine.arguments["name_or_path"] == "letters"
    assert (tmp_path / "output" / "runs" / "suite" / "right" / "stats.json").exists()
    assert not (tmp_path / "output" / "runs" / "suite" / "wrong" / "stats.json").exists()

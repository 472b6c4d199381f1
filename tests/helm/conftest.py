"""HELM's registries with a few deployments, and its services in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("helm", reason="needs crfm-helm, which comes with the extra `helm`")

from helm.benchmark.executor import ExecutionSpec
from helm.benchmark.model_deployment_registry import ClientSpec, ModelDeployment, WindowServiceSpec, register_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec, register_tokenizer_config
from helm.common.authentication import Authentication
from helm.common.cache_backend_config import SqliteCacheBackendConfig

from flexgen_helm.assets import install_helm_data
from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.helm import registry
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.runner import FlexGenRunner
from tests.helm.fakes import FakeLoader

RunSuite = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _deployments() -> None:
    """Two deployments of the fake engine and one of HELM's own; texts are tokenised into letters."""
    register_tokenizer_config(
        TokenizerConfig("simple/tokenizer1", TokenizerSpec("helm.tokenizers.simple_tokenizer.SimpleTokenizer"))
    )
    for name, client in (
        ("flexgen/test/letters", ClientSpec(CLIENT, {"name_or_path": "letters"})),
        ("flexgen/test/others", ClientSpec(CLIENT, {"name_or_path": "others"})),
        ("flexgen/test/misspelt", ClientSpec(CLIENT, {"name_or_path": "letters", "dytpe": "float32"})),
        ("simple/model1", ClientSpec("helm.clients.simple_client.SimpleClient")),
    ):
        register_model_deployment(
            ModelDeployment(
                name=name,
                model_name=name.removeprefix("flexgen/"),
                client_spec=client,
                tokenizer_name="simple/tokenizer1",
                window_service_spec=WindowServiceSpec("tests.helm.fakes.LettersWindowService"),
                max_sequence_length=2048,
            )
        )


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLoader]:
    """Engines of this test are fakes."""
    fake = FakeLoader()
    monkeypatch.setattr(registry, "load_engine", fake)
    yield fake
    registry.ENGINES.close()


@pytest.fixture
def close_engine() -> Iterator[None]:
    """The engine that a test has loaded is closed after it."""
    yield
    registry.ENGINES.close()


@pytest.fixture(scope="session")
def helm_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder of HELM with real questions in it."""
    folder = tmp_path_factory.mktemp("output")
    try:
        install_helm_data(folder)
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))
    return folder


def execution_spec(folder: Path, **options: Any) -> ExecutionSpec:
    """Returns how helm-run would call HELM's executor with ``--local-path folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {
        "url": None,
        "auth": Authentication(""),
        "local_path": str(folder),
        "parallelism": 4,
        "sqlite_cache_backend_config": SqliteCacheBackendConfig(str(folder)),
    }
    return ExecutionSpec(**{**defaults, **options})


@pytest.fixture
def run_suite(tmp_path: Path) -> RunSuite:
    """Runs a suite as helm-run does and returns its folder."""

    def run(
        run_specs: list[RunSpec],
        runner: type[Runner] = FlexGenRunner,
        suite: str = "suite",
        cache: str = "cache",
        execution: dict[str, Any] | None = None,
        **options: bool,
    ) -> Path:
        flags = dict.fromkeys(
            (
                "skip_instances",
                "cache_instances",
                "cache_instances_only",
                "skip_completed_runs",
                "exit_on_error",
            ),
            False,
        )
        spec = execution_spec(tmp_path / cache, **(execution or {}))
        runner(spec, str(tmp_path / "output"), suite, **{**flags, **options}).run_all(run_specs)
        return tmp_path / "output" / "runs" / suite

    return run

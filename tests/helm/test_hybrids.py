"""Tiny models that run in single rows, through HELM: answers of client and runner equal plain ``transformers``."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helm.benchmark.config_registry import register_configs_from_directory
from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.clients.auto_client import AutoClient
from helm.common.cache_backend_config import BlackHoleCacheBackendConfig, SqliteCacheBackendConfig
from helm.common.request import Request, RequestResult

from flexgen_helm import plugin
from flexgen_helm.evaluation.commands import Evaluation, environment, run_command
from flexgen_helm.evaluation.suites import Suite
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.registry import ENGINES
from tests.helm.entries import SHORT
from tests.helm.suites import assert_equal_transformers
from tests.models import SINGLE, save_tiny
from tests.tokenizers import save_character_tokenizer

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("close_engine")]
FREQUENT = ("qwen3_5_text",)


def save_tiny_with_tokenizer(family: str, folder: Path) -> Path:
    saved = save_tiny(family, folder)
    save_character_tokenizer(saved)
    return saved


def ask(client: AutoClient, deployment: str, prompt: str = "one") -> RequestResult:
    request = Request(model="any/model", model_deployment=deployment, prompt=prompt, max_tokens=2, temperature=0)
    return client.make_request(request)


@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=() if family in FREQUENT else pytest.mark.slow) for family in SINGLE],
)
def test_client_and_runner_equal_transformers(family: str, tmp_path: Path, helm_output: Path) -> None:
    rows = {"gpu_batch_size": 16, "gpu_batch_tokens": 64}
    entries = SHORT[::2] if family in FREQUENT else SHORT
    assert_equal_transformers(entries, save_tiny_with_tokenizer(family, tmp_path), helm_output, 3, policy=rows)


def test_helms_log_says_once_that_rows_are_single_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    handler, helms = logging.Handler(), logging.getLogger("helm")
    monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(helms, "handlers", [handler])
    monkeypatch.setattr(helms, "level", logging.INFO)
    folder = save_tiny_with_tokenizer("falcon_h1", tmp_path)
    client = AutoClient({}, str(tmp_path), BlackHoleCacheBackendConfig())
    assert all(ask(client, f"flexgen/{folder}", prompt).success for prompt in ("one", "two"))
    (line,) = [line for line in lines if "single rows" in line]
    assert re.search(rf"falcon_h1 \(falcon_h1\) runs in single rows.*{SINGLE['falcon_h1'].reason}", line)


@pytest.mark.slow
@pytest.mark.parametrize("by_runner", [True, False])
def test_helm_run_shows_the_line(by_runner: bool, tmp_path: Path) -> None:
    folder = save_tiny_with_tokenizer("nemotron_h", tmp_path)
    entries = tmp_path / "brackets.conf"
    entries.write_text('entries: [{description: "dyck_language:num_parenthesis_pairs=2,model=text", priority: 1}]')
    evaluation = Evaluation(f"flexgen/{folder}", Suite("brackets", entries, packaged=True), tmp_path / "output", 2)
    command = [sys.executable, "-m", "helm.benchmark.run", *run_command(evaluation)[1:]]
    command = command if by_runner else command[: command.index("--runner-class-name")]
    process = subprocess.run(command, env=environment(evaluation), capture_output=True, text=True, check=True)
    (line,) = [line for line in (process.stdout + process.stderr).splitlines() if "single rows" in line]
    assert re.search(rf"\(nemotron_h\) runs in single rows.*{SINGLE['nemotron_h'].reason}", line)
    assert len(list(evaluation.suite_folder.glob("*/stats.json"))) == 1


def write_deployment(rows: str, model_folder: Path, local_path: Path) -> str:
    """Registers a deployment as helm-run reads it from the user's files; returns its name."""
    name = f"flexgen/{model_folder.name}/{rows}"
    local_path.mkdir()
    (local_path / "model_deployments.yaml").write_text(
        f"""
model_deployments:
  - name: {name}
    client_spec: {{class_name: {CLIENT}, args: {{name_or_path: {model_folder}, rows: {rows}}}}}
"""
    )
    register_configs_from_directory(str(local_path))
    plugin.complete_written_deployments()
    return name


def test_a_written_deployment_chooses_the_kind_of_rows(tmp_path: Path) -> None:
    folder = save_tiny_with_tokenizer("llama", tmp_path)
    client = AutoClient({}, str(tmp_path), SqliteCacheBackendConfig(str(tmp_path)))
    for rows in ("packed", "single"):
        deployment = write_deployment(rows, folder, tmp_path / rows)
        first, again = ask(client, deployment), ask(client, deployment)
        # Kinds of rows differ in the last digits, so neither is given the answers of the other.
        assert (first.success, first.cached, again.cached) == (True, False, True)
        with ENGINES.lease(get_model_deployment(deployment).client_spec.args) as engine:
            assert engine.rows == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [("both", "rows is 'both'. Give 'auto', 'packed' or 'single'."), ("packed", "Leave rows at 'auto' to try single rows.")],
)
def test_a_kind_of_rows_that_cannot_be_is_refused_at_once(rows: str, message: str, tmp_path: Path) -> None:
    deployment = write_deployment(rows, save_tiny_with_tokenizer("falcon", tmp_path), tmp_path / "local")
    begin = time.monotonic()
    result = ask(AutoClient({}, str(tmp_path), BlackHoleCacheBackendConfig()), deployment)
    assert message in (result.error or "")
    assert time.monotonic() - begin < 60  # HELM repeats for 150 seconds

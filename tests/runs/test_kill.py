"""A suite that is killed at random moments ends as if it had not been."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.runs.kill_test.__main__ import kill
from flexgen_helm.runs.kill_test.suite import Command, forking
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "disable_cache"), [(1, True), (3, False)])
def test_killed_suite_equals_an_undisturbed_one(kills: int, disable_cache: bool, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    save_character_tokenizer(model)
    tally = kill(Command(model, tmp_path, 4, disable_cache), kills, seed=1)
    assert tally.kills == kills
    assert tally.completed >= 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", [None, "kv4", "s10", "kv4s10"])
def test_killed_suite_with_its_cache_on_disk(variant: str | None, tmp_path: Path) -> None:
    """Prompts are longer than a chunk of 128 tokens, so that sealed pages are read."""
    model = save_tiny("llama", tmp_path)
    save_character_tokenizer(model)
    engine: dict[str, Any] = {"policy": {"cache": [0, 0, 1]}, "offload_folder": str(tmp_path / "pages")}
    engine |= {"compression": variant} if variant else {}
    tally = kill(Command(model, tmp_path, 4, True, engine), 1, seed=1)
    assert tally.kills == 1
    assert tally.completed >= 1


@pytest.mark.slow
def test_a_command_finds_helms_imports_and_configuration_done() -> None:
    """In a second each instead of ten, so that a hundred kills take minutes."""
    context = forking()
    ours, theirs = context.Pipe()
    process = context.Process(target=_tell, args=(theirs,))
    process.start()
    theirs.close()
    modules, models, deployments = ours.recv()
    process.join()
    from flexgen_helm.runs.kill_test import preloaded

    assert modules >= set(preloaded.MODULES)
    assert "flexgen_helm.plugin" not in modules  # it completes what a command registers before
    assert preloaded.BUILT_IN in models
    assert len(deployments) == len(set(deployments))
    before = models
    preloaded.prepare()
    preloaded.prepare()
    from helm.benchmark.model_metadata_registry import get_all_models

    assert get_all_models() == before  # nothing twice


def _tell(connection: Connection) -> None:
    """Say what a process has before it does anything."""
    modules = set(sys.modules)
    from helm.benchmark.model_deployment_registry import ALL_MODEL_DEPLOYMENTS
    from helm.benchmark.model_metadata_registry import get_all_models

    connection.send((modules, get_all_models(), [deployment.name for deployment in ALL_MODEL_DEPLOYMENTS]))

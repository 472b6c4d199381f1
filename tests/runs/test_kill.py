"""A suite that is killed at random moments ends as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.runs.kill_test.__main__ import kill
from flexgen_helm.runs.kill_test.suite import Command
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

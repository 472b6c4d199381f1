"""A suite that is killed at random moments ends as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_helm.runs.kill_test.__main__ import kill
from tests.models import save_tiny
from tests.tokenizers import save_character_tokenizer


@pytest.mark.parametrize(("kills", "disable_cache"), [(1, True), pytest.param(3, False, marks=pytest.mark.slow)])
def test_killed_suite_equals_an_undisturbed_one(kills: int, disable_cache: bool, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    save_character_tokenizer(model)
    tally = kill(tmp_path, model, kills, seed=1, max_eval_instances=4, disable_cache=disable_cache)
    assert tally.kills == kills
    assert tally.completed >= 1

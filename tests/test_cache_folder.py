from __future__ import annotations

import threading
from pathlib import Path

import pytest

from flexgen_helm.cache_folder import build_once, cache_folder, write_first, write_whole
from flexgen_helm.errors import OutOfSpace


@pytest.mark.parametrize("value", [None, ""])
def test_default_cache_lies_in_the_home_folder(value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLEXGEN_HELM_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("FLEXGEN_HELM_CACHE", value)
    assert cache_folder() == tmp_path / ".cache" / "flexgen_helm"


def test_environment_variable_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"


def test_folder_is_built_once(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("whole")

    target = tmp_path / "a" / "b"
    for _ in range(2):
        assert build_once(target, build, needed_bytes=1) == target
    assert (target / "file").read_text() == "whole"
    assert len(calls) == 1
    assert list(target.parent.iterdir()) == [target]


def test_failed_build_leaves_nothing_and_is_repeated(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        build_once(target, fail, needed_bytes=1)
    assert list(tmp_path.iterdir()) == []
    build_once(target, lambda folder: (folder / "file").touch(), needed_bytes=1)
    assert (target / "file").exists()


def test_second_of_two_builders_keeps_the_first_result(tmp_path: Path) -> None:
    target = tmp_path / "target"

    def overtaken(folder: Path) -> None:
        (folder / "file").write_text("second")
        target.mkdir()
        (target / "file").write_text("first")

    build_once(target, overtaken, needed_bytes=1)
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_full_disk_is_refused_before_the_build(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        pytest.fail("the build was started")

    with pytest.raises(OutOfSpace, match=r"needs .* MB, but only .* MB are free.*FLEXGEN_HELM_CACHE"):
        build_once(tmp_path / "target", build, needed_bytes=10**18)


def test_a_reader_finds_a_whole_text_while_others_write(tmp_path: Path) -> None:
    file, texts = tmp_path / "new" / "file", [letter * 100_000 for letter in "abc"]
    write_whole(file, texts[0])

    def write(text: str) -> None:
        for _ in range(100):
            write_whole(file, text)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    found = {file.read_text()}
    while any(writer.is_alive() for writer in writers):
        found.add(file.read_text())
    assert found <= set(texts)
    assert list(file.parent.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(file, "\ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_first_of_several_texts_stays(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    for text in ("first", "second"):
        write_first(file, text)
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]

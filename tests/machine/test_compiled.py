"""Loops that Numba compiles: machine code is kept in the cache folder, or beside the source where that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_helm.kv_cache import seal_kernel
from flexgen_helm.machine import compiled as module
from flexgen_helm.machine.compiled import compiled


def double(x: float) -> float:
    return 2 * x


def test_code_is_kept_by_what_the_loops_are_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path))
    first, again = compiled(double), compiled(double)
    assert first(3.0) == again(3.0) == 6.0
    assert (sum(first.stats.cache_hits.values()), sum(again.stats.cache_hits.values())) == (0, 1)
    (folder,) = (tmp_path / "compiled" / "loops").iterdir()
    assert list(folder.glob("test_compiled.double-*.nbc"))
    monkeypatch.setattr(module, "_digest", lambda file: "others")
    other = compiled(double)
    assert other(3.0) == 6.0
    assert not other.stats.cache_hits


@pytest.mark.parametrize("gone", [False, True])
def test_a_folder_that_cannot_be_written_costs_a_compilation(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXGEN_HELM_CACHE", str(tmp_path / "cache"))
    if not gone:
        (tmp_path / "cache").touch()
    loop = compiled(double)
    if gone:
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
        (tmp_path / "cache").touch()
    assert loop(3.0) == 6.0


def test_a_loop_is_made_of_its_file_and_what_that_imports_directly_or_through_other_loops() -> None:
    made_of = {path.name for path in module._made_of(Path(seal_kernel.__file__))}
    assert {"seal_kernel.py", "floats.py", "compiled.py", "pages.py", "token_rows.py"} <= made_of
    assert not {"decode_kernel.py", "sealed_format.py"} & made_of

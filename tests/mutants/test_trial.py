"""A mutant is tried in a copy, and what becomes of it is told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.trial import Copy

CODE = "def double(x):\n    return x + x\n"
TESTS = "from flexgen_helm.code import double\n\ndef test_of_two():\n    assert double(2) == 4\n"


def mutant(old: str, new: str) -> Mutant:
    return Mutant(new, "flexgen_helm/code.py", old, new, ("tests/test_code.py",), "")


@pytest.mark.slow
def test_mutants_are_killed_survive_or_cannot_be_tried(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for package in ("flexgen_helm", "runs", "scenarios", "tests"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").touch()
    shutil.copytree(Path(__file__).parent, root / "tests" / "mutants")
    (root / "flexgen_helm" / "code.py").write_text(CODE)
    (root / "tests" / "test_code.py").write_text(TESTS)
    copy = Copy(root, tmp_path / "copy")
    try:
        plain = copy.run(("tests/test_code.py",))
        killed = copy.try_mutant(mutant("x + x", "x - x"))
        survivor = copy.try_mutant(mutant("x + x", "x * x"))
        broken = copy.try_mutant(mutant("def double", "def other"))
    finally:
        copy.close()
    assert (plain.verdict, killed.verdict, survivor.verdict, broken.verdict) == ("survived", "killed", "survived", "error")
    assert killed.detail == "tests/test_code.py::test_of_two"
    assert "ImportError" in broken.detail
    assert (root / "flexgen_helm" / "code.py").read_text() == (copy.folder / "flexgen_helm" / "code.py").read_text() == CODE

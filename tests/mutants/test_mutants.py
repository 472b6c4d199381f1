"""The mutants fit the code as it is, so that `python -m tests.mutants` tries what it says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.lists import MUTANTS
from tests.mutants.mutant import Mutant, MutantError

ROOT = Path(__file__).resolve().parents[2]


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_fits_the_code(mutant: Mutant) -> None:
    mutant.mutated(ROOT)
    assert mutant.tests
    assert mutant.missing_tests(ROOT) == []


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return 2", "return 3", "occurs 0 times"),
        ("a", "b", "occurs 2 times"),
        ("return 1", "return 1", "is what is there already"),
        ("return 1", "return )", "no Python"),
    ],
)
def test_drifted_mutant_is_an_error(old: str, new: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("def a(a):\n    return 1\n")
    mutant = Mutant("drifted", "code.py", old, new, ("code.py", "code.py::b", "gone.py"), "")
    with pytest.raises(MutantError, match=reason):
        mutant.mutated(tmp_path)
    assert mutant.missing_tests(tmp_path) == ["code.py::b", "gone.py"]

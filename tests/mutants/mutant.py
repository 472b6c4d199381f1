"""One fault that the tests must notice."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path


class MutantError(Exception):
    """A mutant that no longer fits the code."""


@dataclass(frozen=True)
class Mutant:
    """A change of a few characters that makes the code wrong."""

    name: str
    file: str
    """From the root of the checkout."""
    old: str
    """Occurs exactly once in the file. Keep it short and stable."""
    new: str
    tests: tuple[str, ...]
    """Pytest's names of the tests that must notice, the quickest first; they take seconds, not minutes."""
    why: str
    """What a user would suffer."""

    def mutated(self, root: Path) -> str:
        """Return the file's wrong text.

        Raises:
            MutantError: ``old`` is not there exactly once, changes nothing, or leaves no Python.
        """
        path = root / self.file
        if not path.is_file():
            raise MutantError(f"{self.name}: there is no file {self.file}. Name the file that has this code now.")
        text = path.read_text()
        if text.count(self.old) != 1:
            raise MutantError(
                f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}, not once. "
                "Adapt the mutant to the code."
            )
        wrong = text.replace(self.old, self.new)
        if wrong == text:
            raise MutantError(f"{self.name}: {self.new!r} is what is there already.")
        try:
            ast.parse(wrong)
        except SyntaxError as error:
            raise MutantError(f"{self.name}: {self.file} is no Python with {self.new!r} ({error}).") from error
        return wrong

    def missing_tests(self, root: Path) -> list[str]:
        """Return those of its tests that do not exist."""
        return [test for test in self.tests if not _exists(root, test)]


def _exists(root: Path, test: str) -> bool:
    file, _, function = test.partition("::")
    path = root / file
    return path.is_file() and (not function or f"def {function.partition('[')[0]}(" in path.read_text())

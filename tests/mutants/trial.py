"""A copy of the checkout in which one mutant at a time is tried. The checkout itself is never changed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.mutants.mutant import Mutant

TEST_SECONDS = 120
"""After which a single test has failed: some mutants wait for ever."""
TRIAL_SECONDS = 600
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build", "dist", "*.egg-info")
# The editable installation finds these two at the top level; in a copy the import system needs them inside of the package.
SUBPACKAGES = ("runs", "scenarios")
_TORN = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)

Verdict = Literal["killed", "survived", "error"]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    verdict: Verdict
    seconds: float
    detail: str
    """The test that noticed, or the end of what pytest printed."""


class Copy:
    """A copy of the checkout that Python imports in place of it."""

    def __init__(self, root: Path, folder: Path) -> None:
        """Copy ``root`` to ``folder``, which must not exist.

        Raises:
            RuntimeError: Python imports the package from elsewhere.
        """
        self.folder = folder
        shutil.copytree(root, folder, ignore=LEFT_OUT, symlinks=True)
        for name in SUBPACKAGES:
            (folder / "flexgen_helm" / name).symlink_to(folder / name, target_is_directory=True)
        # Without bytecode files a mutant of the same size and second is never mistaken for the original.
        own = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self._environment = {**os.environ, **own, "TOKENIZERS_PARALLELISM": "false"}
        self._check_imports()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.server"],
            cwd=folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: tuple[str, ...]) -> Outcome:
        """Run tests as the copy stands, until the first one fails."""
        plugins = ("-p", "no:cacheprovider", "-p", "tests.mutants.quick_hypothesis")
        options = ("-x", "-q", "-rfE", "--tb=line", "-m", "not slow", f"--timeout={TEST_SECONDS}", *plugins)
        begin = time.monotonic()
        output = self.folder / "output.txt"
        process = int(self._ask(json.dumps([str(output), [*options, *tests]])))
        alarm = threading.Timer(TRIAL_SECONDS, _end, (process,))
        alarm.start()
        try:
            status = int(self._answer())
        finally:
            alarm.cancel()
            _end(process)  # and whatever it has left running
        return _outcome(status, time.monotonic() - begin, output.read_text(errors="replace"))

    def close(self) -> None:
        """Stop running tests."""
        self._server.terminate()
        self._server.wait()

    def _ask(self, request: str) -> str:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{request}\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()

    def try_mutant(self, mutant: Mutant) -> Outcome:
        """Run a mutant's tests against it.

        Raises:
            MutantError: It does not fit the code.
        """
        path = self.folder / mutant.file
        right = path.read_text()
        path.write_text(mutant.mutated(self.folder))
        try:
            return self.run(mutant.tests)
        finally:
            path.write_text(right)

    def _check_imports(self) -> None:
        modules = ("flexgen_helm", *(f"flexgen_helm.{name}" for name in SUBPACKAGES), "tests")
        code = f"import importlib\nfor name in {modules}: print(*importlib.import_module(name).__path__)"
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=self.folder, env=self._environment, capture_output=True, text=True, check=True
        )
        elsewhere = [path for path in found.stdout.split() if not Path(path).resolve().is_relative_to(self.folder.resolve())]
        if elsewhere:
            raise RuntimeError(f"The copy in {self.folder} is not what Python imports, but {', '.join(elsewhere)}.")


def _outcome(status: int, seconds: float, output: str) -> Outcome:
    if status == 0:
        return Outcome("survived", seconds, "")
    failed = _TORN.findall(output)
    # 1: tests failed. Below 0: a signal ended the process. Others, such as files that cannot be imported, try nothing.
    if status == 1 and failed:
        return Outcome("killed", seconds, failed[0])
    if status < 0:
        return Outcome("killed", seconds, f"ended by signal {-status}, or no end within {TRIAL_SECONDS} s")
    return Outcome("error", seconds, f"pytest ended with status {status}:\n{output[-2000:]}")


def _end(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)

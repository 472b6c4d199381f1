"""Tests that measure a whole process, run in one of their own: threads of other tests allocate and free there too."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BODY = "measurement"


def alone(test: Callable[[], None]) -> Callable[[], None]:
    """Run a test in a new process, which all such tests of a module share, one after the other."""

    @functools.wraps(test)
    def run() -> None:
        error = _errors(test.__module__)[test.__name__]
        assert not error, error

    setattr(run, _BODY, test)
    return run


@functools.cache
def _errors(module: str) -> dict[str, str]:
    """What went wrong in each test of a module, empty where nothing did."""
    command = [sys.executable, "-m", __name__, module]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    found: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return found


def _error(test: Callable[[], None]) -> str:
    try:
        test()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    content = vars(importlib.import_module(sys.argv[1]))
    print(json.dumps({name: _error(getattr(value, _BODY)) for name, value in content.items() if hasattr(value, _BODY)}))

"""Runs pytest in forks of a process that has imported the large libraries, so that a mutant costs seconds of a shared machine.

A request is a line of JSON on standard input: the file for what pytest prints, and pytest's arguments. The answers are two
lines: the number of the process, whose group it leads, and its exit status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from contextlib import suppress

LARGE = ("numpy", "scipy.stats", "torch", "transformers", "hypothesis", "pytest", "pandas", "datasets", "helm.benchmark.runner")


def main() -> None:
    """Serve until standard input ends."""
    for name in LARGE:
        with suppress(ImportError):  # such as HELM, without which its tests skip themselves
            importlib.import_module(name)
    assert "flexgen_helm" not in sys.modules, "what is tested must be imported by each test process"
    gc.freeze()
    for line in sys.stdin:
        output, arguments = json.loads(line)
        process = os.fork()
        if not process:
            _become_pytest(output, arguments)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become_pytest(output: str, arguments: list[str]) -> None:
    import pytest

    os.setsid()
    with open(os.devnull) as nothing, open(output, "w") as file:
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source.fileno(), target)
    status = 3  # pytest's own for an internal error
    try:
        status = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()

"""One part in a process of its own, which is killed with all that it started when its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexgen_helm.runs.gpu_check.parts import PARTS, Part
from flexgen_helm.runs.gpu_check.sizes import TINY, Sizes

LOG_CHARACTERS = 20_000
"""Of what a part printed, the end that is kept."""


def run_part(part: Part, *, dry_run: bool) -> dict[str, Any]:
    """Run a part.

    Args:
        part: The part.
        dry_run: Whether in tiny sizes on the CPU.

    Returns:
        ``seconds``, ``log``, and ``result`` or ``error``.
    """
    with tempfile.TemporaryDirectory() as name:
        file, log = Path(name, "result.json"), Path(name, "log")
        command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-m", __name__, part.name, str(file)]
        begun = time.perf_counter()
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [*command, *(["--dry-run"] if dry_run else [])], stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(part.limit_s)
                error = f"ended with status {process.returncode}"
            except subprocess.TimeoutExpired:
                error = f"not done within {part.limit_s} s"
            finally:
                _kill(process)
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"error": error}
        printed = log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
        return {"seconds": time.perf_counter() - begun, **found, "log": printed}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measured(part: Part, sizes: Sizes) -> dict[str, Any]:
    """Return a part's ``result``; where packages are missing or something fails the ``error``, and print where it was."""
    try:
        return {"result": part.measure(sizes)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main(arguments: list[str]) -> None:
    """Measure the part that is named, and write what was found into a file."""
    name, file, *options = arguments
    part = next(part for part in PARTS if part.name == name)
    found = measured(part, TINY if options else Sizes())
    whole = Path(f"{file}.part")
    whole.write_text(json.dumps(found), encoding="utf-8")
    whole.replace(file)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Code for a GPU, compiled without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def assert_it_compiles(code: str, arguments: Sequence[str], folder: Path) -> None:
    """Runs code that compiles a kernel by Triton's own compiler and assembler, in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    (folder / "compile.py").write_text(code)
    command = [sys.executable, str(folder / "compile.py"), *arguments]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]

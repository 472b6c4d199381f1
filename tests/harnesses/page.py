"""The commands of docs/harnesses.md, run by the tests of the harness that they belong to."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "harnesses.md"


def commands(beginning: str) -> list[str]:
    """Returns the commands of the page that begin with some words."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(beginning)]


def run(command: str, folder: Path, program: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the page in a folder that has the model at `path/to/model`.

    Args:
        command: The command.
        folder: The folder.
        program: What stands for its first word.
        more: Arguments that the page's reader would not give.
    """
    process = [*program, *shlex.split(command)[1:], *more]
    return subprocess.run(process, capture_output=True, text=True, check=False, cwd=folder)

"""HELM's commands as processes: their log in a file, their progress on the screen, the cause when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.console import SPEAKER, VARIABLE
from flexgen_helm.processes import Terminated

MODULES = {"helm-run": "helm.benchmark.run", "helm-summarize": "helm.benchmark.presentation.summarize"}
FOLLOW_SECONDS = 0.2
MOST_CAUSE = 1000
"""Characters of a cause that are repeated; requests are quoted at the end of some."""


def execute(command: Sequence[str], environment: Mapping[str, str], log: Path, *, verbose: bool) -> int:
    """Run a command of HELM and return its exit status.

    Args:
        command: Its name and arguments.
        environment: Its environment.
        log: File to which everything it prints is appended.
        verbose: Whether that is shown as well; otherwise its steps and their progress are.

    Raises:
        FlexGenError: If this process is terminated, as by a launcher when a stage of a pipeline is lost; says why the command
            ended.
    """
    # The same interpreter, whatever is first in PATH.
    module = [sys.executable, "-m", MODULES[command[0]], *command[1:]]
    console = os.dup(2)
    handed = {} if verbose else {VARIABLE: str(console)}
    variables = {**environment, **handed, "PYTHONUNBUFFERED": "1"}
    try:
        with (
            log.open("ab") as file,
            subprocess.Popen(module, env=variables, stdout=file, stderr=subprocess.STDOUT, pass_fds=[console]) as process,
        ):
            try:
                if verbose:
                    _follow(process, log, file.tell())
                return process.wait()
            except KeyboardInterrupt:
                # The signal has reached HELM too, which keeps what is finished before it ends.
                process.wait()
                raise
            except Terminated:
                process.terminate()
                raise FlexGenError(cause_of_failure(process.wait(), log)) from None
    finally:
        os.close(console)


def _follow(process: subprocess.Popen[bytes], log: Path, offset: int) -> None:
    """Show what a process appends to its log until it ends."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(offset)
        while True:
            ended = process.poll() is not None
            sys.stdout.write(file.read())
            sys.stdout.flush()
            if ended:
                return
            time.sleep(FOLLOW_SECONDS)


def cause_of_failure(status: int, log: Path) -> str:
    """Return in one line why a command failed: its last error, or the signal that ended it."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", which the system sends where memory is exhausted" if -status == signal.SIGKILL else ""
        return f"It was ended by {name}{hint}."
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.removeprefix(SPEAKER) for line in reversed(lines) if line.startswith(SPEAKER)), None)
    if said is not None:
        return _shortened(said)
    begin = max((at + 1 for at, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")), default=None)
    if begin is None:
        return next((line.strip() for line in reversed(lines) if line.strip()), "It printed nothing.")
    # Frames are indented; what follows them is the error.
    error = next((at for at in range(begin, len(lines)) if lines[at][:1].strip()), len(lines) - 1)
    kind, colon, message = " ".join(" ".join(lines[error:]).split()).partition(":")
    return _shortened(f"{kind.rpartition('.')[2]}{colon}{message}")


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CAUSE else f"{text[:MOST_CAUSE]}..."

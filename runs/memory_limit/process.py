"""One contender: a process of its own under the limit, with the disk's rate right before and after."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.memory_limit.cgroup import Ended, memory_group, run_free
from flexgen_helm.runs.memory_limit.disk import direct_read_rate, drop_page_cache

NOT_PERMITTED = 3
"""Exit status of commands where memory cannot be limited."""
LOG_END = 3000
"""Characters of a failed command's log that are shown."""


@dataclass(frozen=True)
class Limits:
    """Limits of all contenders."""

    memory_bytes: int | None
    """None: no limit, where a GPU's memory is the one that matters."""
    threads: int
    folders: tuple[Path, ...]
    """Folders of the model's files, which are dropped from the page cache. The disk's speed is measured in the first."""


@dataclass(frozen=True)
class Measured:
    """Measurements before, during and after a process."""

    ended: Ended
    disk_before: float
    """Direct reads in bytes per second."""
    disk_after: float
    log_end: str

    @property
    def disk(self) -> float:
        """The mean of both."""
        return (self.disk_before + self.disk_after) / 2


def run_limited(command: Sequence[str], limits: Limits, log: Path) -> Measured:
    """Run a command under the limit.

    Raises:
        NotPermitted: If memory cannot be limited here.
        FlexGenError: If the command failed for another reason than memory; the end of its log says why.
    """
    for folder in limits.folders:
        drop_page_cache(folder)
    # Waiting threads give up their core: beside other work, spinning ones make both sides several times slower.
    environment = {
        "OMP_NUM_THREADS": str(limits.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = direct_read_rate(limits.folders[0])
    if limits.memory_bytes is None:
        ended = run_free(command, log, environment)
    else:
        with memory_group(limits.memory_bytes) as group:
            ended = group.run(command, log, environment)
    log_end = log.read_text(encoding="utf-8", errors="replace")[-LOG_END:]
    if ended.status and not ended.out_of_memory:
        raise FlexGenError(f"{' '.join(command[:3])} ended with status {ended.status}. The end of its log:\n{log_end}")
    return Measured(ended, before, direct_read_rate(limits.folders[0]), log_end)


def run_task(module: str, task: Any, limits: Limits, scratch: Path, name: str) -> tuple[Measured, Path]:
    """Give a module its task, a dataclass, as a file; returns what was measured and where the result is, if there is one."""
    importing = [sys.executable, "-c", f"import {module}"]
    return run_side([sys.executable, "-m", module], importing, task, limits, scratch / name)


def run_side(command: Sequence[str], importing: Sequence[str], task: Any, limits: Limits, stem: Path) -> tuple[Measured, Path]:
    """Give a command its task as a file; returns what was measured and where the result is, if there is one.

    A process without a limit imports what it needs first: who reads a page of a library for the first time is charged for it.

    Args:
        command: Files of the task and of the result are added to it.
        importing: A command that imports what the other one does; whether it fails does not matter.
        task: A dataclass.
        limits: Limits of the command.
        stem: Beginning of the paths of task, result and log.
    """
    given, result, log = (stem.with_name(f"{stem.name}.{kind}") for kind in ("task.json", "result.json", "log"))
    given.write_text(json.dumps(asdict(task)), encoding="utf-8")
    result.unlink(missing_ok=True)
    run_free(importing, log, {})
    return run_limited([*command, str(given), str(result)], limits, log), result

"""The clock set back or forward while a command runs, between two, and times of files that are not true."""

from __future__ import annotations

import os
import random
import time
from functools import partial
from pathlib import Path

from flexgen_helm.runs.fault_matrix.commands import INSTANCES, Running, differing, fresh, tiers
from flexgen_helm.runs.fault_matrix.outcomes import Outcome
from flexgen_helm.runs.fault_matrix.processes.undisturbed import Undisturbed
from flexgen_helm.runs.kill_test.suite import Command, helm_run

DAY = 86_400.0


class ClockPart:
    """See `flexgen_helm.runs.fault_matrix.worker.Part`."""

    def __init__(self, folder: Path, whole: Undisturbed) -> None:
        self._folder, self._whole = folder, whole

    def run(self, case: str) -> list[Outcome]:
        """Kill a command when it has a few answers, and run it again under another clock."""
        kind, number = case.split()
        fault, generator = kind.replace("_", " "), random.Random(f"clock {number}")
        folder = fresh(self._folder / "clock")
        command = Command(
            self._whole.model, folder / "output", INSTANCES, disable_cache=False, engine=tiers(folder / "offload")
        )
        durable = Running(command).kill_after(generator.randint(1, 12))
        calls = generator.randint(1, 400) if kind.endswith("in_a_run") else 0
        days = generator.choice((1, 400, 9000)) * {"back": -1, "forw": 1}.get(kind[:4], 0)
        if kind.startswith("files"):
            _set_times(self._folder, time.time() + 9000 * DAY if kind.endswith("future") else 0)
        ended = Running(command, partial(with_clock, days * DAY, calls)).end()
        if failure := ended.failure(fault):
            return [failure]
        names = differing(command, self._whole.expected)
        if ended.status or names:
            return [Outcome(fault, "wrong", note=f"{case}: {ended.message} {names}")]
        again = set(command.computed.read_text().split() if command.computed.exists() else ()) & set(durable)
        return [Outcome(fault, "wrong", note=f"{case}: computed again") if again else Outcome(fault, "answered")]


def with_clock(jump: float, calls: int, arguments: list[str], log: Path, computed: Path) -> None:
    """Be ``helm-run`` with a clock that jumps by so many seconds after so many calls."""
    real, count = time.time, iter(range(10**9))
    time.time = lambda: real() + (jump if next(count) >= calls else 0)
    helm_run(arguments, log, computed)


def _set_times(folder: Path, seconds: float) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (seconds, seconds))

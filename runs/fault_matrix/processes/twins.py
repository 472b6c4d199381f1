"""Two commands at once on one suite folder, with one folder for what is on disk."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path

from flexgen_helm.runs.fault_matrix.commands import INSTANCES, Running, differing, fresh, tiers
from flexgen_helm.runs.fault_matrix.outcomes import Outcome
from flexgen_helm.runs.fault_matrix.processes.undisturbed import Undisturbed
from flexgen_helm.runs.kill_test.suite import Command

LATEST_S = 6.0
"""The second command begins at most so many seconds behind the first."""
REFUSAL = "Another helm-run is working on the same run entries of this suite"


class SomeRuns(Command):
    """The command with half of its run entries."""

    def arguments(self) -> list[str]:
        """Return the arguments of ``helm-run``."""
        whole = super().arguments()
        begin, end = whole.index("--run-entries") + 1, whole.index("--suite")
        return [*whole[: (begin + end) // 2], *whole[end:]]


class TwinsPart:
    """See `flexgen_helm.runs.fault_matrix.worker.Part`."""

    def __init__(self, folder: Path, whole: Undisturbed) -> None:
        self._folder, self._whole = folder, whole

    def run(self, case: str) -> list[Outcome]:
        """Start two commands; one that is refused runs again when both have ended."""
        kind, number = case.split()
        fault, moments = kind.replace("_", " "), random.Random(f"twins {number}")
        folder = fresh(self._folder / "twins")
        first = Command(
            self._whole.model,
            folder / "output",
            INSTANCES,
            False,
            tiers(folder / "offload"),
            log_folder=fresh(folder / "first"),
        )
        second = replace(first, log_folder=fresh(folder / "second"))
        if kind == "some_of_the_runs":
            second = SomeRuns(**vars(second))
        commands = [first, second] if moments.random() < 0.5 else [second, first]
        running = [Running(commands[0])]
        time.sleep(moments.choice((0, 0, moments.uniform(0, LATEST_S))))
        running.append(Running(commands[1]))
        refused = 0
        for each in running:
            ended = each.end()
            if failure := ended.failure(fault):
                return [failure]
            if ended.status and REFUSAL not in ended.message:
                return [Outcome(fault, "wrong", note=f"{case}: {ended.message}")]
            refused += bool(ended.status)
        again = Running(first).end()
        if failure := again.failure(fault):
            return [failure]
        names = differing(first, self._whole.expected)
        if again.status or names:
            return [Outcome(fault, "wrong", note=f"{case}: {again.message} {names}")]
        return [Outcome(fault, "refused" if refused else "answered")]

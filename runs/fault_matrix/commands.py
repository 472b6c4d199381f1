"""Commands of a small suite, with weights and cache on the tiers and compressed, and how they end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from flexgen_helm.helm.console import SPEAKER
from flexgen_helm.runs.fault_matrix.cases import COMMAND_S
from flexgen_helm.runs.fault_matrix.outcomes import Outcome
from flexgen_helm.runs.kill_test.__main__ import journal_keys
from flexgen_helm.runs.kill_test.files import read_suite
from flexgen_helm.runs.kill_test.suite import Command

INSTANCES = 3
TRACEBACK = "Traceback (most recent call last)"


def tiers(offload_folder: Path) -> dict[str, Any]:
    """Return keywords of an engine whose weights and cache are compressed and lie on host and disk."""
    policy = {"weights": [0, 0.5, 0.5], "cache": [0, 0.5, 0.5], "gpu_batch_size": 16, "gpu_batch_tokens": 64}
    return {"compression": "w4kv4", "policy": policy, "offload_folder": str(offload_folder)}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """None: it had not ended in time."""
    text: str
    """What it printed."""

    @property
    def message(self) -> str:
        """The line with which it says why it failed; empty if there is none."""
        return next((line for line in reversed(self.text.splitlines()) if line.startswith(SPEAKER)), "")

    def failure(self, fault: str) -> Outcome | None:
        """Return the outcome of a command that hung or showed a traceback; None for another."""
        if self.status is None:
            return Outcome(fault, "hung", note=self.text[-1000:])
        if TRACEBACK in self.text or (self.status and not self.message):
            return Outcome(fault, "traceback", note=self.text[max(0, self.text.rfind(TRACEBACK)) :][:3000])
        return None


class Running:
    """A command that has begun."""

    def __init__(self, command: Command, target: Callable[[list[str], Path, Path], None] | None = None) -> None:
        """Start it; see `Command.start`."""
        self.command = command
        self._begin = command.log.stat().st_size if command.log.exists() else 0
        self.process: BaseProcess = command.start(target)

    def end(self, seconds: float = COMMAND_S) -> Ended:
        """Wait for its end, and end it by force where it hangs."""
        self.process.join(seconds)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            self.process.join()
        text = self.command.log.read_text(encoding="utf-8", errors="replace") if self.command.log.exists() else ""
        return Ended(status, text[self._begin :])

    def kill_after(self, answers: int) -> list[str]:
        """Kill it when the journal has so many answers, or wait for its end; returns the keys of answers in the journal."""
        while self.process.is_alive() and len(journal_keys(self.command.suite_folder)) < answers:
            time.sleep(0.002)
        self.process.kill()
        self.process.join()
        keys: list[str] = journal_keys(self.command.suite_folder)
        return keys


def fresh(folder: Path) -> Path:
    """Return a folder that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def whole_suite(model: Path, folder: Path, engine: dict[str, Any] | None = None) -> Path:
    """Return the folder of a suite that nothing disturbed, made if it is missing."""
    command = Command(model, folder, INSTANCES, disable_cache=False, engine=engine or {})
    done = folder / "done"
    if not done.exists():
        fresh(folder)
        ended = Running(command).end()
        if ended.status != 0:
            raise RuntimeError(f"the undisturbed suite ended with status {ended.status}: {ended.text[-2000:]}")
        done.touch()
    made: Path = command.suite_folder
    return made


def differing(command: Command, expected: dict[str, Any]) -> list[str]:
    """Return the names of HELM's files that differ from those of the undisturbed suite."""
    actual = read_suite(command.suite_folder)
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))

"""SIGKILLs at random moments: of a suite with tiers and compression, and of the fit of its compressed weights."""

from __future__ import annotations

import random
import time
from pathlib import Path

from flexgen_helm import Engine, Policy
from flexgen_helm.memory.slab_folder import TEMPORARY
from flexgen_helm.runs.fault_matrix.cases import COMMAND_S
from flexgen_helm.runs.fault_matrix.commands import INSTANCES, TRACEBACK, fresh, tiers
from flexgen_helm.runs.fault_matrix.outcomes import Outcome
from flexgen_helm.runs.fault_matrix.processes.undisturbed import Undisturbed
from flexgen_helm.runs.kill_test.__main__ import kill
from flexgen_helm.runs.kill_test.suite import Command, forking


class KillsPart:
    """See `flexgen_helm.runs.fault_matrix.worker.Part`."""

    def __init__(self, folder: Path, whole: Undisturbed) -> None:
        self._folder, self._whole = folder, whole

    def run(self, case: str) -> list[Outcome]:
        """Kill as often as the case says."""
        name, number, count = case.split()
        folder = fresh(self._folder / name)
        if name == "fit":
            return self._kill_fits(folder, int(count), random.Random(f"kills {number}"))
        command = Command(self._whole.model, folder, INSTANCES, disable_cache=False, engine=tiers(folder / "offload"))
        try:
            tally = kill(command, int(count), seed=int(number), expected=self._whole.expected)
        except AssertionError as error:
            return [Outcome("suite", _verdict(str(error), folder), note=f"{case}: {error}")]
        return [Outcome("suite", "answered", tally.kills)]

    def _kill_fits(self, folder: Path, count: int, moments: random.Random) -> list[Outcome]:
        context = forking()
        whole, killed = folder / "whole", folder / "killed"
        begun = time.monotonic()
        for _ in range(2):  # timed once the slow imports are done
            fresh(whole)
            begun = time.monotonic()
            process = context.Process(target=_fit, args=(self._whole.model, whole))
            process.start()
            process.join()
            if process.exitcode != 0:
                return [Outcome("fit", "traceback", note=f"undisturbed: status {process.exitcode}; see the log")]
        seconds, right, kills = time.monotonic() - begun, _files(whole), 0
        while True:
            before = {path: path.stat().st_mtime_ns for path in killed.rglob("unit_*.slab")}
            process = context.Process(target=_fit, args=(self._whole.model, killed))
            process.start()
            process.join(moments.uniform(0, seconds) if kills < count else COMMAND_S)
            process.kill()
            process.join()
            if any(not path.exists() or path.stat().st_mtime_ns != written for path, written in before.items()):
                return [Outcome("fit", "wrong", note="a whole slab was written again")]
            kills += process.exitcode == -9
            if process.exitcode == 0 and (found := _files(killed)) != right:
                differing = sorted(name for name in found.keys() | right.keys() if found.get(name) != right.get(name))
                return [Outcome("fit", "wrong", note=f"these files differ: {differing}")]
            if process.exitcode not in (0, -9):
                return [Outcome("fit", "traceback", note=f"status {process.exitcode}; see the log")]
            if process.exitcode == 0:
                if left := [path.name for path in killed.rglob(f"{TEMPORARY}*")]:
                    return [Outcome("fit", "wrong", note=f"half-written files are left: {left}")]
                if kills >= count:
                    return [Outcome("fit", "answered", count)]
                fresh(killed)


def _fit(model: Path, folder: Path) -> None:
    options = tiers(folder)
    Engine.from_pretrained(str(model), **{**options, "policy": Policy(**options["policy"])}).close()


def _files(folder: Path) -> dict[str, bytes]:
    """Return slabs and decisions: what is kept of a fit."""
    names = ("unit_*.slab", "unit_*.json", "fit/decisions.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.glob(name)}


def _verdict(message: str, folder: Path) -> str:
    if "lost" in message or "not durable" in message:
        return "lost"
    logs = "".join(path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("log.txt"))
    return "traceback" if TRACEBACK in logs else "wrong"

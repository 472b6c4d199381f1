"""Disks of several sizes that fill up: the command says which file; with more room the same command completes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flexgen_helm.runs.fault_matrix.commands import INSTANCES, Running, differing, fresh, tiers
from flexgen_helm.runs.fault_matrix.outcomes import Outcome
from flexgen_helm.runs.fault_matrix.processes.undisturbed import Undisturbed
from flexgen_helm.runs.kill_test.suite import Command

LEAST, BLOCK = 2**17, 4096
"""Bytes of the smallest disk, which holds the questions; bytes of a block."""
FAULT = "disk"
REFUSALS = ("DiskFull", "OutOfSpace", "of disk space, but")
"""In the message of a command whose disk is full; the last is of a plan for which it is too small."""


class DisksPart:
    """See `flexgen_helm.runs.fault_matrix.worker.Part`."""

    def __init__(self, folder: Path, whole: Undisturbed) -> None:
        self._disk, self._logs, self._whole = folder / "disk", folder / "logs", whole
        paths = [path for path in whole.folder.rglob("*") if path.is_file()]
        self._whole_bytes = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in paths)

    def run(self, case: str) -> list[Outcome]:
        """Run the suite on a disk of a size, and again when it is larger."""
        size = LEAST + int(float(case.split()[1]) * self._whole_bytes)
        self._disk.mkdir(exist_ok=True)
        subprocess.run(["umount", "-l", str(self._disk)], check=False, capture_output=True)  # of a killed worker
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self._disk)]
        mounted = subprocess.run(mount, check=False, capture_output=True, text=True)
        if mounted.returncode:
            return [Outcome(FAULT, "skipped", note=f"no disk can be mounted here: {mounted.stderr.strip()}")]
        try:
            return [self._fill(size)]
        finally:
            subprocess.run(["umount", "-l", str(self._disk)], check=True)

    def _fill(self, size: int) -> Outcome:
        command = Command(
            self._whole.model,
            self._disk / "output",
            INSTANCES,
            disable_cache=False,
            engine=tiers(self._disk / "offload"),
            log_folder=fresh(self._logs),
        )
        ended = Running(command).end()
        if failure := ended.failure(FAULT):
            return failure
        if ended.status and str(self._disk) not in ended.message:
            return Outcome(FAULT, "wrong", note=f"{size} bytes: no file on the disk is named: {ended.message}")
        if ended.status and not any(word in ended.message for word in REFUSALS):
            return Outcome(FAULT, "wrong", note=f"{size} bytes: {ended.message}")
        subprocess.run(["mount", "-o", f"remount,size={4 * (self._whole_bytes + LEAST)}", str(self._disk)], check=True)
        again = Running(command).end()
        if failure := again.failure(FAULT):
            return failure
        names = differing(command, self._whole.expected)
        if again.status or names:
            return Outcome(FAULT, "wrong", note=f"{size} bytes: with more room: {again.message} {names}")
        return Outcome(FAULT, "refused" if ended.status else "answered")

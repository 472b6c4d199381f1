"""Answers of an unfinished suite, durable as soon as they are known, so that a killed run goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from helm.common.hierarchical_logger import hwarn

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.disk import clear_disk_errors
from flexgen_helm.helm.requests import Response

FOLDER = "flexgen_journal"
"""In the suite's folder, while a command is unfinished."""
SYNC_SECONDS = 1.0
"""A record survives the death of the process at once, and a power failure after this time."""

Record = dict[str, Any]


class Journal:
    """What one ``helm-run`` command has computed so far: a file of one record a line, each with its checksum.

    Its name follows from the run entries, so the same command finds it again; answers are found by what they depend
    on, in the files of other commands on the same suite too. A record that is torn is as if it had not been written.
    """

    def __init__(self, folder: Path, runs: Iterable[str]) -> None:
        """Open the journal of these runs and read what is there.

        Args:
            folder: Of all journals of a suite; made if there is none.
            runs: Names of the command's runs.

        Raises:
            FlexGenError: Another process works on the same runs of the same suite.
            DiskFull: There is no space left.
        """
        self._runs = sorted(runs)
        self._path = folder / f"{hashlib.sha256(json.dumps(self._runs).encode()).hexdigest()[:16]}.jsonl"
        self._responses: dict[str, Response] = {}
        self._policies: dict[str, dict[str, Any]] = {}
        self._synced = time.monotonic()
        with clear_disk_errors(str(self._path)):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b", buffering=0)
        if not _lock(self._file.fileno()):
            self._file.close()
            raise FlexGenError(
                f"Another helm-run is working on the same run entries of this suite: it holds {self._path}. "
                "Wait for it, end it, or use another --suite."
            )
        for path in sorted(folder.glob("*.jsonl")):
            for record in _read(path):
                self._take(record)
        self._begin()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def lookup(self, key: str) -> Response | None:
        """Return the answer that an earlier process has computed, if any.

        Args:
            key: Everything that the answer depends on.
        """
        return self._responses.get(_digest(key))

    def append(self, key: str, response: Response) -> None:
        """Keep an answer; it survives the death of this process from the moment at which this returns.

        Raises:
            DiskFull: There is no space left; what was appended before is kept.
        """
        digest = _digest(key)
        if digest in self._responses:
            return  # equal requests are computed once and answered one by one
        self._write({"key": digest, "response": response})
        self._responses[digest] = response
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def policy(self, deployment: str) -> dict[str, Any] | None:
        """Return the policy under which an earlier process served a deployment: its row sizes are numerics."""
        return self._policies.get(deployment)

    def note_policy(self, deployment: str, policy: Mapping[str, Any]) -> None:
        """Remember under which policy a deployment is served."""
        if self._policies.get(deployment) != policy:
            self._write({"deployment": deployment, "policy": dict(policy)})
            self._policies[deployment] = dict(policy)

    def discard(self) -> None:
        """Delete what is no longer needed when all runs are complete: this journal, and others of no further run."""
        self._path.unlink()
        for path in self._path.parent.glob("*.jsonl"):
            runs: list[str] = next((record["runs"] for record in _read(path) if "runs" in record), [])
            with path.open("rb") as file:
                if set(runs) <= set(self._runs) and _lock(file.fileno()):
                    path.unlink()

    def _begin(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        if size == 0:
            self._write({"runs": self._runs})
            return
        self._file.seek(size - 1)
        if self._file.read(1) != b"\n":
            # The torn record gets a line of its own.
            with clear_disk_errors(str(self._path)):
                self._file.write(b"\n")

    def _take(self, record: Record) -> None:
        if "response" in record:
            self._responses[record["key"]] = record["response"]
        elif "policy" in record:
            self._policies[record["deployment"]] = record["policy"]

    def _write(self, record: Record) -> None:
        text = json.dumps(record).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        with clear_disk_errors(str(self._path)):
            while line:
                line = line[self._file.write(line) :]


def _read(path: Path) -> Iterator[Record]:
    """Yield the undamaged records of a file; the last one may be half of one, after a kill or on a full disk."""
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.rstrip(b"\n").partition(b" ")
            if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text):
                yield json.loads(text)
            elif line.strip():
                damaged += 1
    if damaged:
        hwarn(f"{damaged} torn record(s) in {path}: what they held is computed again.")


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()

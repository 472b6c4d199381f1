"""Answers of an unfinished suite, durable as soon as they are known, so that a killed run goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from helm.common.hierarchical_logger import hwarn

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.disk_errors import clear_disk_errors
from flexgen_helm.helm.requests import Response, checked

FOLDER = "flexgen_journal"
"""In the suite's folder, while a command is unfinished."""
SYNC_SECONDS = 1.0
"""A record survives the death of the process at once. For a power failure, the file is synchronised at most this often while
records come, and at the end."""
KEY_START = b'{"key": "'


class _Line(NamedTuple):
    """An undamaged record of a journal and where it stands."""

    path: Path
    offset: int
    text: bytes
    """JSON."""
    end: int
    """Offset behind it."""


class Journal:
    """The answers that one ``helm-run`` command has computed so far: a file of one record a line, each with its checksum.

    Its name follows from the run entries, so the same command finds it again; answers are found by what they depend
    on, in the files of other commands on the same suite too. A record that is torn is as if it had not been written.
    Processes that share a command's work have a file each, of which the command's own journal is told by `refresh`.
    """

    def __init__(self, folder: Path, runs: Iterable[str], *, helps: bool = False) -> None:
        """Open the journal of these runs and read what is there.

        Args:
            folder: Holds all journals of a suite; made if missing.
            runs: Names of the command's runs.
            helps: Whether this process answers a part of another's command. Its file is the first that no living helper
                of these runs has, so that one that takes over for a dead one goes on in that one's file.

        Raises:
            FlexGenError: Another process works on the same runs of the same suite.
            DiskFull: There is no space left.
        """
        self.runs = sorted(runs)
        """Names of the command's runs."""
        self._name = hashlib.sha256(json.dumps(self.runs).encode()).hexdigest()[:16]
        self._path = folder / f"{self._name}.jsonl"
        self._found: dict[str, tuple[Path, int]] = {}
        """File and offset at which the record of an answer begins, by the digest of its key."""
        self._policies: dict[str, dict[str, float]] = {}
        self._synced, self._unsynced = time.monotonic(), False
        with clear_disk_errors(str(self._path)):
            folder.mkdir(parents=True, exist_ok=True)
            if helps:
                self._path, self._file = _open_free(folder / f"{self._name}-{number}.jsonl" for number in count(1))
            else:
                self._file = _open_locked(self._path)
        self.unfinished = self._path.with_suffix("")
        """Folder for files of runs that are not complete."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self._ends: dict[Path, int] = {}
        """Up to where the file of each helper was read."""
        try:
            with clear_disk_errors(str(folder)):
                for path in sorted(folder.glob("*.jsonl")):
                    for line in _read(path):
                        self._take(line)
                        self._ends[path] = line.end
            self._begin()
        except BaseException:
            self._file.close()  # which holds the lock
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._sync()
        finally:
            self._file.close()

    def lookup(self, key: str) -> Response | None:
        """Return the answer that an earlier process has computed, if any.

        Args:
            key: Everything that the answer depends on.
        """
        if (found := self._found.get(_digest(key))) is None:
            return None
        path, offset = found
        with path.open("rb") as file:
            file.seek(offset)
            response = checked(json.loads(_checked(file.readline()) or b"{}").get("response"))
        if response is None:
            del self._found[_digest(key)]  # what is computed instead is kept
        return response

    def append(self, key: str, response: Response) -> None:
        """Keep an answer; it survives the death of this process from the moment at which this returns.

        Raises:
            DiskFull: There is no space left; what was appended before is kept.
        """
        digest = _digest(key)
        if digest in self._found:
            return  # equal requests are computed once and answered one by one
        self._found[digest] = self._path, self._write({"key": digest, "response": response})
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def refresh(self) -> list[dict[str, Any]]:
        """Read what helpers of these runs have written since the last time.

        Returns:
            Each new record: of an answer its ``key``, of a helper's beginning what `note_helper` was given.
        """
        records = []
        for path in sorted(self._path.parent.glob(f"{self._name}-*.jsonl")):
            for line in _read(path, quiet=True, start=self._ends.get(path, 0)):
                self._take(line)
                self._ends[path] = line.end
                key = _key(line)
                records.append(json.loads(line.text) if key is None else {"key": key})
        return records

    def note_helper(self, **who: Any) -> None:
        """Say in the journal which process goes on with it."""
        self._write({"helper": who})

    def policy(self, deployment: str) -> Mapping[str, float]:
        """Return the `Numerics.policy_fields` with which this command served a deployment before; none if it did not."""
        return self._policies.get(deployment, {})

    def note_policy(self, deployment: str, fields: Mapping[str, float]) -> None:
        """Remember fields of a policy with which a deployment is served, so that a resumed command uses the same."""
        if self._policies.get(deployment) != fields:
            self._policies[deployment] = dict(fields)
            self._write({"deployment": deployment, "policy": self._policies[deployment]})

    def discard(self) -> None:
        """Delete what is no longer needed when all runs are complete: this journal, and others of no further run."""
        self._path.unlink(missing_ok=True)
        self._unsynced = False
        for path in self._path.parent.glob("*.jsonl"):
            runs = next((json.loads(line.text)["runs"] for line in _read(path) if line.text.startswith(b'{"runs"')), None)
            with path.open("rb") as file:
                if isinstance(runs, list) and all(run in self.runs for run in runs) and _lock(file.fileno()):
                    path.unlink()
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)

    def remove_empty_folders(self) -> None:
        """Remove folders in which nothing is left."""
        for folder in (self.unfinished, self._path.parent):
            with suppress(OSError):
                folder.rmdir()

    def _begin(self) -> None:
        """Give a torn record a line of its own, and name the runs where that record or the file's beginning is lost."""
        size = self._file.seek(0, os.SEEK_END)
        with clear_disk_errors(str(self._path)):
            if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
                self._file.write(b"\n")
        if not any(line.text.startswith(b'{"runs"') for line in _read(self._path, quiet=True)):
            self._write({"runs": self.runs})

    def _take(self, line: _Line) -> None:
        if (key := _key(line)) is not None:
            self._found[key] = line.path, line.offset
        elif line.path == self._path:
            record = json.loads(line.text)
            fields = record.get("policy")
            # A record of another version, which has another form, is left alone.
            if isinstance(fields, dict) and all(isinstance(value, int | float) for value in fields.values()):
                self._policies[str(record.get("deployment"))] = fields

    def _write(self, record: Mapping[str, Any]) -> int:
        """Append a record and return where it begins."""
        text = json.dumps(record).encode()
        line, offset = b"%08x %s\n" % (zlib.crc32(text), text), self._file.seek(0, os.SEEK_END)
        with clear_disk_errors(str(self._path)):
            while line:
                line = line[self._file.write(line) :]
        self._unsynced = True
        return offset

    def _sync(self) -> None:
        """Wait until what is new is on the disk."""
        if self._unsynced:
            with clear_disk_errors(str(self._path)):
                os.fsync(self._file.fileno())
            self._synced, self._unsynced = time.monotonic(), False


def _open_locked(path: Path) -> FileIO:
    """Open a file that no other living process has open in this way."""
    while True:
        file = path.open("a+b", buffering=0)
        if not _lock(file.fileno()):
            file.close()
            raise FlexGenError(
                f"Another helm-run is working on the same run entries of this suite: it holds {path}. "
                "Wait for it, end it, or use another --suite."
            )
        # Its last owner may have deleted it between the two lines above.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            return file
        file.close()


def _open_free(paths: Iterable[Path]) -> tuple[Path, FileIO]:
    """Open the first of some files that no other living process has open in this way."""
    for path in paths:
        with suppress(FlexGenError):
            return path, _open_locked(path)
    raise AssertionError("there is always another name")


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path, *, quiet: bool = False, start: int = 0) -> Iterator[_Line]:
    """Yield the undamaged records of a file; the last one may be half of one, after a kill or on a full disk."""
    damaged, offset = 0, start
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            text = _checked(line)
            if text is not None:
                yield _Line(path, offset, text, offset + len(line))
            else:
                damaged += bool(line.strip())
            offset += len(line)
    if damaged and not quiet:
        hwarn(f"{damaged} torn record(s) in {path}: their requests are computed again.")


def _checked(line: bytes) -> bytes | None:
    """Return the text of a line whose checksum is right."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    return text if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(text) else None


def _key(line: _Line) -> str | None:
    """Return the digest of the key of an answer, None of another record."""
    if not line.text.startswith(KEY_START):
        return None
    # Not parsed: a long suite has gigabytes of answers, and each is wanted once.
    return line.text[len(KEY_START) : len(KEY_START) + 64].decode()


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()

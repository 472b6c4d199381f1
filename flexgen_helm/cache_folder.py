"""Cache folder: holds everything that the package fetched, converted or measured, in folders that are built once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flexgen_helm.errors import OutOfSpace


def cache_folder() -> Path:
    """Return ``$FLEXGEN_HELM_CACHE``, or ``~/.cache/flexgen_helm`` if it is unset or empty. The folder may not exist yet."""
    return Path(os.environ.get("FLEXGEN_HELM_CACHE") or "~/.cache/flexgen_helm").expanduser()


def write_whole(file: Path, text: str) -> None:
    """Write a text file of which readers find the old text or the new one, never a part, even if several processes write it.

    Args:
        file: File to write. Its parents are created.
        text: The new content.

    Raises:
        OSError: If it cannot be written; then the old file stays.
    """
    _write(file, text, os.replace)


def write_record(file: Path, record: Any) -> None:
    """Write what is noted for later processes, as JSON with a checksum; see `write_whole`.

    Args:
        file: File to write.
        record: Plain data.

    Raises:
        OSError: If it cannot be written.
    """
    write_whole(file, json.dumps({"sha256": _checksum(record), "record": record}, indent=1))


def read_record(file: Path) -> Any:
    """Read what `write_record` wrote.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is damaged, or of another version.
    """
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "record" not in found or found.get("sha256") != _checksum(found["record"]):
        raise ValueError(f"{file} is not what was written")
    return found["record"]


def _checksum(record: Any) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_first(file: Path, text: str) -> None:
    """Write a text file as `write_whole` does, unless there is one: of several processes, the first one decides.

    Raises:
        OSError: If it cannot be written.
    """
    with suppress(FileExistsError):
        _write(file, text, _move_to_free_name)


def _write(file: Path, text: str, move: Callable[[str, Path], None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        move(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _move_to_free_name(source: str, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.replace(source, target)
    else:
        os.unlink(source)


@contextmanager
def locked(file: Path, *, say_waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a file that one thread of one process holds at a time. A process that ends, in whatever way, lets go of it.

    Args:
        file: File to hold, made if there is none. Its holder may replace it.
        say_waits: Called before the wait for another holder.

    Raises:
        OSError: If the file cannot be made, or its file system has no locks.
    """
    while True:
        with file.open("a") as held:
            try:
                fcntl.flock(held.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say_waits()
                fcntl.flock(held.fileno(), fcntl.LOCK_EX)
            # Its last holder may have replaced it between the two lines above.
            if file.exists() and file.stat().st_ino == os.fstat(held.fileno()).st_ino:
                yield
                return


def build_once(target: Path, build: Callable[[Path], None], *, needed_bytes: int) -> Path:
    """Return ``target``, a folder that ``build`` fills if it does not exist yet.

    ``build`` works in a folder next to the target that is renamed when it returns, so a killed build leaves nothing
    that looks finished. If two processes build at once, the second to finish drops its copy.

    Args:
        target: Folder to return. Its parents are created.
        build: Function that fills the empty folder given to it.
        needed_bytes: Free disk space without which the build is not started.

    Raises:
        OutOfSpace: If the file system of ``target`` has less than ``needed_bytes`` free.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise OutOfSpace(
            f"Building {target} needs {needed_bytes / 1e6:.0f} MB, but only {free_bytes / 1e6:.0f} MB are free there. "
            "Free some space, or point FLEXGEN_HELM_CACHE at a larger disk."
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        built = Path(temporary) / target.name
        built.mkdir()
        build(built)
        try:
            built.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target

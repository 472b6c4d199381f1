"""One clear error where a disk is full or a file cannot be written."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from flexgen_helm.errors import DISK_FULL_ERRNOS, DiskFull, FlexGenError

# A file size limit is an I/O error to SQLite.
_SQLITE_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
RESUME = "Finished answers are kept; run the same command again to continue."


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that a disk, quota or file size limit is exhausted."""
    while error is not None:
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS):
            return True
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE_FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def clear_disk_errors(path: str) -> Iterator[None]:
    """Turn what the operating system or SQLite says of a file into an error that says what to do.

    Raises:
        DiskFull: There is no space left.
        FlexGenError: The file cannot be read or written for another reason.
    """
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if is_disk_full(error):
            raise DiskFull(f"{path} cannot be written: {error}. Free some space. {RESUME}") from error
        raise FlexGenError(
            f"{path} cannot be read or written: {error}. Check that it is yours, undamaged and not used by another "
            f"program, or move it away. {RESUME}"
        ) from error

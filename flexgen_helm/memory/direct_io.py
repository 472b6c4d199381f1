"""Direct I/O: a few threads read and write files in pieces, bypassing the page cache."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flexgen_helm.errors import DISK_FULL_ERRNOS, CorruptFile, DiskFull, FlexGenError
from flexgen_helm.memory.amounts import PAGE

logger = logging.getLogger(__name__)

PIECE = 4 * 2**20
"""Bytes of one request to the disk. At a quarter of it, contention between the threads costs a tenth of the disk's rate."""


class DirectFile:
    """An open file that is read and written without the page cache, if its file system supports direct I/O."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        """Open the file.

        Args:
            path: Path of the file.
            flags: Flags for `os.open`.

        Raises:
            CorruptFile: If the file does not exist.
            DiskFull: If there is no space for a new file.
            FlexGenError: If the file cannot be opened for another reason.
        """
        self.path = path
        self.is_direct = True
        try:
            try:
                self.descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.descriptor, self.is_direct = os.open(path, flags, 0o666), False
        except OSError as error:
            raise file_error(path, error) from error

    def close(self) -> None:
        """Close the file. No request may be running; a second call does nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read(self, offset: int, into: Tensor) -> None:
        """Fill memory (uint8 ``[bytes]``) from the file, in this thread.

        Args:
            offset: First byte to read.
            into: Memory to fill.

        Raises:
            CorruptFile: If the file ends too early.
            FlexGenError: If the file cannot be read.
        """
        view, done = into.numpy().data, 0
        while done < len(view):
            count = self._call(os.preadv, [view[done:]], offset + done)
            done += count
            if not count:
                raise CorruptFile(f"{self.path} is torn: it ends after {offset + done} bytes, where more were written.")
        if not self.is_direct:
            os.posix_fadvise(self.descriptor, offset, done, os.POSIX_FADV_DONTNEED)

    def write(self, offset: int, memory: Tensor) -> None:
        """Write memory (uint8 ``[bytes]``) to the file, in this thread.

        Args:
            offset: First byte to write in the file.
            memory: Content.

        Raises:
            DiskFull: If there is no space left.
            FlexGenError: If the file cannot be written for another reason.
        """
        view, done = memory.numpy().data, 0
        while done < len(view):
            count = self._call(os.pwritev, [view[done:]], offset + done)
            if not count:
                raise file_error(self.path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            done += count

    def _call(self, call: Callable[..., int], *arguments: object) -> int:
        try:
            try:
                return call(self.descriptor, *arguments)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._leave_direct()
                return call(self.descriptor, *arguments)
        except OSError as error:
            raise file_error(self.path, error) from error

    def _leave_direct(self) -> None:
        """Turn direct I/O off: some file systems refuse it only in calls, and all refuse it just before a size limit."""
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.is_direct = False


@dataclass(eq=False)
class _Request:
    """A read or write of several pieces."""

    file: DirectFile
    is_write: bool
    then: Callable[[], None] | None = None
    left: int = 0
    """Pieces that have not ended."""
    done: Future[None] = field(default_factory=Future)
    error: BaseException | None = None


class DiskIO:
    """A pool of threads that read and write files. All methods may be called from any thread."""

    def __init__(self, num_threads: int = 4) -> None:
        """Start no thread before the first request.

        Args:
            num_threads: Requests to the disk at a time.
        """
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="flexgen-helm-disk")
        self._lock = threading.Lock()
        self._closed = self._has_warned = False

    def read(self, file: DirectFile, offset: int, into: Tensor, then: Callable[[], None] | None = None) -> Future[None]:
        """Start to fill memory from a file.

        Args:
            file: File to read; must stay open until the future is done.
            offset: First byte in the file, a multiple of PAGE.
            into: uint8 ``[bytes]``, whole pages at a page boundary; must not be touched until the future is done.
            then: Function that an I/O thread calls when all bytes have arrived.

        Returns:
            A future that is done when the memory is filled and ``then`` has returned. It raises CorruptFile if the file is too
            short, FlexGenError if it cannot be read, and whatever ``then`` raises. After an error, too, no thread touches the
            memory any more.
        """
        return self._start(_Request(file, False, then), offset, into)

    def write(self, file: DirectFile, offset: int, memory: Tensor) -> Future[None]:
        """Start to write memory to a file.

        Args:
            file: File to write; must stay open until the future is done.
            offset: First byte in the file, a multiple of PAGE.
            memory: uint8 ``[bytes]``, whole pages at a page boundary; must not be touched until the future is done.

        Returns:
            A future that raises DiskFull if there is no space left, FlexGenError if the file cannot be written otherwise.
        """
        return self._start(_Request(file, True), offset, memory)

    def close(self) -> None:
        """Wait for pieces that are being read or written; pieces that have not begun fail."""
        self._closed = True
        self._pool.shutdown()

    def _start(self, request: _Request, offset: int, memory: Tensor) -> Future[None]:
        if not memory.nbytes or (memory.data_ptr() | memory.nbytes | offset) % PAGE:
            raise ValueError(f"{memory.nbytes} bytes at {memory.data_ptr():#x} for offset {offset} are not whole pages")
        begins = range(0, memory.nbytes, PIECE)
        request.left = len(begins)
        request.done.set_running_or_notify_cancel()  # so that nobody can cancel it while threads use the memory
        for begin in begins:
            self._pool.submit(self._run, request, offset + begin, memory[begin : begin + PIECE])
        return request.done

    def _run(self, request: _Request, offset: int, piece: Tensor) -> None:
        try:
            if self._closed:
                raise FlexGenError(f"{request.file.path} was closed before all of it was read or written.")
            if request.error is None:
                transfer = request.file.write if request.is_write else request.file.read
                transfer(offset, piece)
        except BaseException as error:
            request.error = error
        with self._lock:
            request.left -= 1
            is_last = not request.left
        if is_last:
            self._finish(request)

    def _finish(self, request: _Request) -> None:
        try:
            if request.error is None and request.then is not None:
                request.then()
        except BaseException as error:
            request.error = error
        if request.error is None and not request.file.is_direct and not self._has_warned:
            self._has_warned = True
            logger.info("%s does not support direct I/O here; reads and writes go through the page cache", request.file.path)
        if request.error is None:
            request.done.set_result(None)
        else:
            request.done.set_exception(request.error)


def file_error(path: Path, error: OSError) -> FlexGenError:
    """Return the error to raise for a file in an offload folder: DiskFull, CorruptFile (missing), else FlexGenError."""
    if error.errno in DISK_FULL_ERRNOS:
        return DiskFull(f"{path} cannot be written: {error.strerror}. Free some space, or give another offload_folder.")
    if error.errno == errno.ENOENT:
        return CorruptFile(
            f"{path} is missing: the offload folder was removed or moved while it was in use. Run the command again; missing "
            "files are written again."
        )
    return FlexGenError(
        f"{path} cannot be read or written: {error.strerror}. Check the disk and who may use the folder, or give another "
        "offload_folder."
    )

"""Reads and writes of files past the page cache, in pieces, by a few threads."""

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
from flexgen_helm.memory.buffers import PAGE

logger = logging.getLogger(__name__)

PIECE = 4 * 2**20
"""Bytes of a request to the disk. With a quarter of it the threads lose a tenth of the disk's rate to one another."""


class DirectFile:
    """An open file. It lies beside the page cache where the file system allows that."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        """Open it.

        Args:
            path: The file.
            flags: As for `os.open`.

        Raises:
            CorruptFile: If there is no such file.
            DiskFull: If there is no space for a new one.
            FlexGenError: If it cannot be opened for another reason.
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
        """Close it, once no request is on its way; may be called twice."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read(self, offset: int, into: Tensor) -> None:
        """Fill memory, in this thread."""
        view, done = into.numpy().data, 0
        while done < len(view):
            count = self._call(os.preadv, [view[done:]], offset + done)
            done += count
            if not count:
                raise CorruptFile(f"{self.path} is torn: it ends after {offset + done} bytes, where more were written.")
        if not self.is_direct:
            os.posix_fadvise(self.descriptor, offset, done, os.POSIX_FADV_DONTNEED)

    def write(self, offset: int, memory: Tensor) -> None:
        """Write memory, in this thread."""
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
        """Some file systems refuse direct access only here; and all do so right before a size limit within a page."""
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.is_direct = False


@dataclass(eq=False)
class _Request:
    """Pieces that are done together."""

    file: DirectFile
    is_write: bool
    then: Callable[[], None] | None = None
    left: int = 0
    """Pieces that are not done."""
    done: Future[None] = field(default_factory=Future)
    error: BaseException | None = None


class DiskIO:
    """Threads that read and write. Every method may be called from any thread."""

    def __init__(self, num_threads: int = 4) -> None:
        """Nothing runs before the first request."""
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="flexgen-helm-disk")
        self._lock = threading.Lock()
        self._closed = self._has_warned = False

    def read(self, file: DirectFile, offset: int, into: Tensor, then: Callable[[], None] | None = None) -> Future[None]:
        """Start to fill memory from a file.

        Args:
            file: Is not closed before the future is done.
            offset: Where to begin, a multiple of PAGE.
            into: uint8 ``[bytes]``, whole pages at a page boundary, not to be touched before the future is done.
            then: Called by an I/O thread when all is there.

        Returns:
            Done when the memory is filled and ``then`` has returned, or when no thread touches it any more after an error:
            CorruptFile if the file is too short, FlexGenError if it cannot be read, and whatever ``then`` raises.
        """
        return self._start(_Request(file, False, then), offset, into)

    def write(self, file: DirectFile, offset: int, memory: Tensor) -> Future[None]:
        """Start to write memory to a file; as `read`, but the future raises DiskFull where there is no more space."""
        return self._start(_Request(file, True), offset, memory)

    def close(self) -> None:
        """Wait for what is being read or written; what has not begun yet fails."""
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
    """Say what became of a file under an offload folder, and what to do."""
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

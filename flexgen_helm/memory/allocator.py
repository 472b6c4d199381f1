"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MIB = 2**20


def return_freed_memory() -> None:
    """Hand back what the C library keeps of freed tensors up to 32 MiB: without this, a layer more after a few layers."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


class LargeTensorMaps:
    """Gives tensors of a mebibyte or more mappings of their own, which go with them, while anyone in this process wants it.

    Else the library keeps what is freed of up to 32 MiB, in heaps of 64 MiB for each thread: activations of 4 to 16 MiB left
    390 MB of holes there. The price is a page fault for every 4 KiB: nothing to a model that does not fit into memory, a
    fifth of the time to one of 135 M parameters.
    """

    def __init__(self) -> None:
        """Nobody wants it."""
        self._lock = threading.Lock()
        self._users = 0

    def begin(self) -> None:
        """Ask for it."""
        self._change(1)

    def end(self) -> None:
        """Ask for it no longer; the last one gives the thresholds back at which the library itself arrives."""
        self._change(-1)

    def _change(self, users: int) -> None:
        set_option = _function("mallopt")
        with self._lock:
            before, self._users = self._users, self._users + users
            if set_option is not None and (before > 0) != (self._users > 0):
                set_option(_MMAP_THRESHOLD, _MIB if self._users else 32 * _MIB)
                set_option(_TRIM_THRESHOLD, 2 * _MIB if self._users else 64 * _MIB)


LARGE_TENSOR_MAPS = LargeTensorMaps()
"""One for the process, since these are settings of its C library: an engine that closes must not change those of another."""


def _function(name: str) -> Callable[..., int] | None:
    """Of the C library; None where it is not glibc."""
    return getattr(ctypes.CDLL(None), name, None)

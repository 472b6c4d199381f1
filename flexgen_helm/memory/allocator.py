"""Return of freed memory to the system and the GPU, by the C library's allocator and by torch's."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from flexgen_helm.memory.amounts import LARGE_TENSOR_BYTES

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MIB = 2**20


def return_freed_memory() -> None:
    """Return freed tensors to the system and to the GPUs; otherwise their allocators keep the memory.

    The C library keeps tensors of up to 32 MiB, about a layer of them. torch keeps all memory that it ever took on a GPU.
    """
    torch.cuda.empty_cache()  # does nothing in a process that has used no GPU
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


class LargeTensorMaps:
    """A switch: tensors of 1 MiB or more get memory mappings of their own, which are unmapped when the tensors are freed.

    It is on while at least one user has called `begin` and not `end`. While it is off, the C library keeps freed memory up to
    32 MiB in heaps of 64 MiB per thread: activations of 4 to 16 MiB left 390 MB of holes there. The price is a page fault for
    every 4 KiB. It is negligible for a model that does not fit into memory, and a fifth of the time with 135 M parameters.
    """

    def __init__(self) -> None:
        """Begin without users: the switch is off."""
        self._lock = threading.Lock()
        self._users = 0

    def begin(self) -> None:
        """Add a user: the first one switches the mappings on."""
        self._change(1)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be a user while the context lasts."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Remove a user: the last one restores the thresholds at which the C library itself arrives."""
        self._change(-1)

    def _change(self, users: int) -> None:
        set_option = _function("mallopt")
        with self._lock:
            before, self._users = self._users, self._users + users
            if set_option is not None and (before > 0) != (self._users > 0):
                set_option(_MMAP_THRESHOLD, LARGE_TENSOR_BYTES if self._users else 32 * _MIB)
                set_option(_TRIM_THRESHOLD, 2 * _MIB if self._users else 64 * _MIB)


LARGE_TENSOR_MAPS = LargeTensorMaps()
"""The switch of this process. All engines share its C library, so closing one engine must not change another's settings."""


def _function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None if the C library is not glibc."""
    return getattr(ctypes.CDLL(None), name, None)

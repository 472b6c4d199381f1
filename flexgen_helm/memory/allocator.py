"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_MIB = 2**20


def return_freed_memory() -> None:
    """Hand back what the C library keeps of freed tensors up to 32 MiB: without this, a layer more after a few layers."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def map_large_tensors(on: bool) -> None:
    """Choose for this process whether tensors of a mebibyte or more get mappings of their own, which go with them.

    Else the library keeps what is freed of up to 32 MiB, in heaps of 64 MiB for each thread: activations of 4 to 16 MiB left
    390 MB of holes there. The price is a page fault for every 4 KiB: nothing to a model that does not fit into memory, a
    fifth of the time to one of 135 M parameters.

    Args:
        on: False: the thresholds that the library itself arrives at.
    """
    set_option = _function("mallopt")
    if set_option is not None:
        set_option(_MMAP_THRESHOLD, _MIB if on else 32 * _MIB)
        set_option(_TRIM_THRESHOLD, 2 * _MIB if on else 64 * _MIB)


def _function(name: str) -> Callable[..., int] | None:
    """Of the C library; None where it is not glibc."""
    return getattr(ctypes.CDLL(None), name, None)

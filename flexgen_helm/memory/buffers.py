"""Memory at page boundaries that is there before its first use, as direct reads and copies to a GPU need it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor

from flexgen_helm.errors import OutOfSpace

PAGE = 4096
"""Direct I/O wants addresses, offsets and lengths in multiples of this many bytes."""


def padded(num_bytes: int) -> int:
    """Round up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE


def allocate(num_bytes: int, *, pin: bool = False) -> Tensor:
    """Return memory of its own, at a page boundary, with all pages present: untouched ones make a first read four times slower.

    Args:
        num_bytes: Rounded up to whole pages.
        pin: Whether a GPU copies from it beside the computation. Exactly these pages are pinned; torch's own pinned memory
            is rounded up to a power of two.

    Returns:
        uint8 ``[bytes]``; freed with the last tensor that views it.

    Raises:
        OutOfSpace: If there is not so much memory.
    """
    size = padded(max(num_bytes, 1))
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise OutOfSpace(
            f"{size / 2**30:.2f} GiB of memory could not be taken ({error}). Put a smaller share on the host, or free memory."
        ) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages; with them direct reads take half of the CPU's time
        pages.madvise(mmap.MADV_HUGEPAGE)
    owner = (ctypes.c_ubyte * size).from_buffer(pages)  # dies before the pages do, which unpinning needs
    memory = torch.frombuffer(owner, dtype=torch.uint8)
    memory[::PAGE] = 0
    if pin:
        _pin(memory, owner)
    return memory


def _pin(memory: Tensor, owner: ctypes.Array[ctypes.c_ubyte]) -> None:
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(memory.data_ptr(), len(memory), 0)
    if int(status) != 0:
        raise OutOfSpace(
            f"{len(memory) / 2**30:.2f} GiB could not be pinned (CUDA status {int(status)}). Raise the limit of locked memory "
            "(ulimit -l), or put a smaller share on the host."
        )
    weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())

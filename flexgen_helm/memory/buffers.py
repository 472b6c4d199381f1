"""Host memory at page boundaries: with all pages present for direct reads and GPU copies, or with pages added on first use."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import weakref

import torch
from torch import Tensor

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.memory.amounts import PAGE, gib, padded

logger = logging.getLogger(__name__)
HUGE_FROM = 64 << 20
"""Bytes from which memory that is taken with its first use comes in huge pages, 2 MiB each: the last one in use is then at most
3% of it. A first use is several times as fast so (runs/LOG.md)."""


def allocate(num_bytes: int, *, pin: bool = False) -> Tensor:
    """Allocate host memory at a page boundary with all pages present; absent pages make a first read four times slower.

    Args:
        num_bytes: Bytes to allocate, rounded up to whole pages.
        pin: Whether to pin the pages, so that a GPU can copy from them while it computes. Exactly these pages are pinned;
            torch's own pinned memory is rounded up to a power of two. Where the system refuses, copies are slower, and a log
            line says so.

    Returns:
        uint8 ``[bytes]``; freed with the last tensor that views it.

    Raises:
        OutOfSpace: If the memory cannot be allocated.
    """
    pages = _mapped(num_bytes, huge=True)  # with which direct reads take half of the CPU's time
    owner = (ctypes.c_ubyte * len(pages)).from_buffer(pages)  # dies before the pages do, which unpinning needs
    memory = torch.frombuffer(owner, dtype=torch.uint8)
    memory[::PAGE] = 0
    if pin:
        _pin(memory, owner)
    return memory


def lazy_zeros(num_bytes: int) -> Tensor:
    """Return zeros ``[num_bytes]`` (uint8) whose pages take memory from their first use; freed with the last tensor.

    The mapping bypasses the C library, which may keep freed memory up to 32 MiB: caches that grow layer by layer took twice
    their size there.

    Raises:
        OutOfSpace: If the memory cannot be allocated.
    """
    return torch.frombuffer(_mapped(num_bytes, huge=num_bytes >= HUGE_FROM), dtype=torch.uint8)[:num_bytes]


def zero_bytes(num_bytes: int, device: torch.device) -> Tensor:
    """Return zeros, uint8 ``[num_bytes]``; on a CPU those of `lazy_zeros`."""
    return lazy_zeros(num_bytes) if device.type == "cpu" else torch.zeros(num_bytes, dtype=torch.uint8, device=device)


def _mapped(num_bytes: int, *, huge: bool) -> mmap.mmap:
    size = padded(max(num_bytes, 1))
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise OutOfSpace(
            f"{gib(size)} of memory could not be taken ({error}). Put a smaller share on the host, or free memory."
        ) from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        if huge:
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _pin(memory: Tensor, owner: ctypes.Array[ctypes.c_ubyte]) -> None:
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(memory.data_ptr(), len(memory), 0))
    if status == 0:
        weakref.finalize(owner, runtime.cudaHostUnregister, memory.data_ptr())
    else:
        _forget_last_error()
        _log_refused_pin(status)


def _forget_last_error() -> None:
    """Clear the error that CUDA keeps of a failed call, which the next kernel would raise; torch has no function for it."""
    clear = getattr(ctypes.CDLL(None), "cudaGetLastError", None)
    if clear is not None:
        clear()


@functools.cache
def _log_refused_pin(status: int) -> None:
    """Say once in a process that memory could not be pinned."""
    logger.warning(
        "host memory could not be pinned (CUDA status %s), so copies between host and GPU are slower and wait for each other: "
        "raise the limit of locked memory (ulimit -l), or put a smaller share on the host",
        status,
    )

"""Threads that OpenMP keeps for each thread that computes on a CPU, and their release."""

from __future__ import annotations

import ctypes

_SOFT = 1  # omp_pause_soft: the next parallel region finds everything else as it was


def release_threads() -> None:
    """End the threads that OpenMP keeps for the calling thread; its next kernel starts them anew.

    A thread should call this before it waits for another one that computes. Each has threads of its own, and while there are
    more of them than cores, libgomp's sleep between two kernels, from which waking takes as long as a small kernel: a CPU with
    two cores took 1.17 times as long (runs/LOG.md). Libraries other than libgomp may keep theirs.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)

"""Measure the highest rates of a disk, with reads and writes that bypass the page cache, to compare a run with them."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.buffers import allocate

PIECE = 2**22
"""Size of one read or write, in bytes."""
NUM_THREADS = 4
"""Number of threads that read or write at once."""
BUFFERS = 8
"""Buffers of `PIECE` bytes for each thread. Together they are larger than the processor's cache, so that reads go to memory, as
those of weights do."""
SECONDS = 0.5
"""Duration of reading, in seconds. The rate of a virtual disk varies within minutes, so more seconds would not help."""
SCRATCH_PIECES = 32
"""Size of the file that is written, in pieces of `PIECE` bytes."""


def disk_rates(folder: Path) -> tuple[float, float]:
    """Measure how fast a disk reads and writes, see `disk_rounds`.

    Args:
        folder: A folder on the disk.

    Returns:
        Rates of reading and of writing, in bytes per second.

    Raises:
        FlexGenError: If the disk has no space for the file, or the folder cannot be written to.
    """
    return disk_rounds(folder, 1)[0]


def disk_rounds(folder: Path, num_rounds: int) -> list[tuple[float, float]]:
    """Measure how fast a disk reads and writes, some times in turn.

    It writes a file of 128 MiB into the folder, reads the largest file there, and removes the written one. A process that is
    killed leaves nothing there.

    Args:
        folder: A folder on the disk.
        num_rounds: Number of rounds.

    Returns:
        For each round the rates of reading and of writing, in bytes per second.

    Raises:
        FlexGenError: If the disk has no space for the file, or the folder cannot be written to.
    """
    try:
        pieces = _random_pieces()
        with tempfile.TemporaryFile(dir=folder) as scratch:  # without a name: nothing is left of a process that is killed
            own, found = Path(f"/proc/self/fd/{scratch.fileno()}"), []
            for _ in range(num_rounds):
                write = _write_rate(own, pieces)
                files = [own, *(path for path in folder.iterdir() if path.is_file())]
                found.append((_read_rate(max(files, key=lambda path: path.stat().st_size), pieces), write))
            return found
    except OSError as error:
        raise FlexGenError(
            f"How fast the disk is could not be measured in {folder} ({error}). Free {SCRATCH_PIECES * PIECE / 2**20:.0f} MiB "
            "there, or give another offload_folder."
        ) from None


def _random_pieces() -> list[memoryview]:
    """Return buffers of random bytes, which no disk can compress, for all threads."""
    memory = allocate(NUM_THREADS * BUFFERS * PIECE).numpy()
    memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), np.uint8)
    return [memoryview(memory[begin : begin + PIECE]) for begin in range(0, len(memory), PIECE)]  # type: ignore[arg-type]


def _read_rate(path: Path, pieces: Sequence[memoryview]) -> float:
    num_pieces = max(1, path.stat().st_size // PIECE)
    descriptor = _open_direct(path, os.O_RDONLY)
    offsets = itertools.count()

    def read(buffers: Sequence[memoryview], begun: float) -> int:
        count = 0
        for buffer in itertools.cycle(buffers):
            if time.perf_counter() >= begun + SECONDS:
                break
            count += os.preadv(descriptor, [buffer], next(offsets) % num_pieces * PIECE)
        return count

    return _rate(descriptor, read, pieces)


def _write_rate(path: Path, pieces: Sequence[memoryview]) -> float:
    descriptor = _open_direct(path, os.O_WRONLY)
    offsets = iter(range(0, SCRATCH_PIECES * PIECE, PIECE))

    def write(buffers: Sequence[memoryview], _: float) -> int:
        return sum(os.pwritev(descriptor, [buffers[0]], offset) for offset in offsets)

    return _rate(descriptor, write, pieces)


def _open_direct(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError:  # a file system without direct access, such as tmpfs
        return os.open(path, flags)


def _rate(descriptor: int, work: Callable[[Sequence[memoryview], float], int], pieces: Sequence[memoryview]) -> float:
    """Run ``work``, which returns a number of bytes, in all threads. Return their total rate in bytes per second.

    ``work`` gets a thread's buffers, and the time at which it may begin: filling them may take longer than reading.
    """
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            begun = time.perf_counter()
            num_bytes = sum(pool.map(work, [pieces[i::NUM_THREADS] for i in range(NUM_THREADS)], [begun] * NUM_THREADS))
            os.fdatasync(descriptor)
            return num_bytes / (time.perf_counter() - begun)
    finally:
        os.close(descriptor)

"""The disk beside a measurement: nothing of a model in the page cache, and the rate of direct reads right now."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from flexgen_helm.machine.disk_rate import disk_rates

ROUNDS = 3


def drop_page_cache(folder: Path) -> None:
    """Put the files of a folder out of the page cache: pages that lie there already are charged to no one who uses them."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not on the disk yet would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def direct_read_rate(folder: Path) -> float:
    """Bytes per second of direct reads by several threads from the largest file of a folder, the median of three.

    Raises:
        FlexGenError: If the folder cannot be measured.
    """
    return statistics.median(disk_rates(folder)[0] for _ in range(ROUNDS))

"""Time work in rounds: the median says how long it takes usually, the spread how far to trust that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from flexgen_helm.machine.profile import Rate

ROUNDS = 5
ROUND_SECONDS = 0.03
"""A round lasts at least about so long: several slices of the system's scheduler, where other work runs on the machine too."""


class Rounds(NamedTuple):
    """Seconds of a call in each of some rounds.

    Attributes:
        wall: By the clock on the wall.
        processor: Processor time of all threads over their number, which is what an idle machine would take; empty on a GPU.
    """

    wall: Sequence[float]
    processor: Sequence[float] = ()


def seconds_of(work: Callable[[], object], device: torch.device, *, threads: int | None = None) -> Rounds:
    """Time a call in some rounds, behind calls that warm up.

    Args:
        work: What is timed. It may leave work on the device, for which each round waits.
        device: The device.
        threads: Threads that work at once. None: all.
    """
    threads = threads or torch.get_num_threads()
    count, (seconds, _) = 1, time_of(work, 1, device, threads)
    seconds = min(seconds, time_of(work, 1, device, threads)[0])  # the first call may compile
    while seconds < ROUND_SECONDS / 2:
        count *= 2
        seconds, _ = time_of(work, count, device, threads)
    rounds = [time_of(work, count, device, threads) for _ in range(ROUNDS)]
    on_gpu = device.type == "cuda"
    return Rounds([wall / count for wall, _ in rounds], [] if on_gpu else [each / count for _, each in rounds])


def time_of(work: Callable[[], object], count: int, device: torch.device, threads: int) -> tuple[float, float]:
    """Return the seconds of some calls by the clock on the wall, and the processor time of each of some threads."""
    begun, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun, (time.process_time() - processor) / threads


def rate_of(amount: float, rounds: Rounds) -> Rate:
    """Return the rate of rounds, each of which did an amount."""
    found = median_of([amount / each for each in rounds.wall])
    seconds = statistics.median(rounds.processor) if rounds.processor else 0.0
    return replace(found, processor=amount / seconds if seconds else 0.0)


def median_of(values: Sequence[float]) -> Rate:
    """Return the median and the spread of values."""
    middle = statistics.median(values)
    return Rate(middle, (max(values) - min(values)) / middle)

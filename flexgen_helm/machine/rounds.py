"""Time work in rounds: the median says how long it takes usually, the spread how far to trust that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from flexgen_helm.machine.profile import Rate

ROUNDS = 5
ROUND_SECONDS = 0.03
"""A round lasts at least about so long: several slices of the system's scheduler, where other work runs on the machine too."""


def seconds_of(work: Callable[[], object], device: torch.device, *, rounds: int = ROUNDS) -> list[float]:
    """Return the seconds of a call in each of some rounds, behind calls that warm up.

    Args:
        work: What is timed. It may leave work on the device, for which each round waits.
        device: The device.
        rounds: Number of rounds.
    """
    count, seconds = 1, _seconds(work, 1, device)
    seconds = min(seconds, _seconds(work, 1, device))  # the first call may compile
    while seconds < ROUND_SECONDS / 2:
        count *= 2
        seconds = _seconds(work, count, device)
    return [_seconds(work, count, device) / count for _ in range(rounds)]


def rate_of(amount: float, seconds: Sequence[float]) -> Rate:
    """Return the rate of rounds, each of which did an amount."""
    return median_of([amount / each for each in seconds])


def median_of(values: Sequence[float]) -> Rate:
    """Return the median and the spread of values."""
    middle = statistics.median(values)
    return Rate(middle, (max(values) - min(values)) / middle)


def _seconds(work: Callable[[], object], count: int, device: torch.device) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun

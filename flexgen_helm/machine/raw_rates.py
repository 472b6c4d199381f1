"""Raw rates of this machine with their spread: memory, the link in each direction and in both at once, the disk."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from flexgen_helm.machine.disk_rate import disk_rounds
from flexgen_helm.machine.profile import Rate
from flexgen_helm.machine.rates import much_memory
from flexgen_helm.machine.rounds import median_of, rate_of, seconds_of

DISK_ROUNDS = 3
"""Each reads for half a second and writes 128 MiB."""


@dataclass(frozen=True)
class LinkRates:
    """Bytes per second between pinned memory and a device.

    Attributes:
        to_device: In one direction alone.
        to_host: In the other one alone.
        duplex: Both at once, over the sum of the two.
    """

    to_device: Rate
    to_host: Rate
    duplex: float


def memory_rate(device: torch.device) -> Rate:
    """Return the bytes per second that are read from the memory of a device, on a CPU by all threads."""
    memory = much_memory(device)
    return rate_of(memory.nbytes, seconds_of(memory.sum, device))


def link_rates(device: torch.device) -> LinkRates:
    """Measure the link to a device; to a CPU it is a copy within its memory."""
    on_gpu = device.type == "cuda"
    there, back = much_memory(device), much_memory(device)
    host, other = (torch.empty_like(x, device="cpu", pin_memory=on_gpu).copy_(x) for x in (there, back))
    streams = [torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext() for _ in range(2)]

    def to_device() -> None:
        with streams[0]:
            there.copy_(host, non_blocking=True)

    def to_host() -> None:
        with streams[1]:
            other.copy_(back, non_blocking=True)

    def both() -> None:
        to_device()
        to_host()

    down = rate_of(there.nbytes, seconds_of(to_device, device))
    up = rate_of(back.nbytes, seconds_of(to_host, device))  # the second may be smaller where memory is short
    together = rate_of(there.nbytes + back.nbytes, seconds_of(both, device))
    return LinkRates(down, up, together.value / (down.value + up.value))


def disk_read_write(folder: Path) -> tuple[Rate, Rate]:
    """Return the bytes per second of direct reads and of direct writes on the disk of a folder.

    Raises:
        FlexGenError: If the disk has no space, or the folder cannot be written to.
    """
    read, write = zip(*disk_rounds(folder, DISK_ROUNDS), strict=True)
    return median_of(read), median_of(write)

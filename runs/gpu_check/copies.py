"""Copies between host and device: small ones behind a large one, and both directions at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from flexgen_helm.machine.rates import random_numbers
from flexgen_helm.runs.gpu_check.sizes import MIB, Sizes

Copy = tuple[Tensor, Tensor]
"""Target and source."""


class Streams:
    """Two streams of a device; a CPU has none, and copies at once."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if self._is_gpu else []

    def copy(self, stream: int, copies: Sequence[Copy]) -> None:
        """Start copies on a stream, one after the other."""
        with torch.cuda.stream(self._streams[stream]) if self._is_gpu else nullcontext():
            for target, source in copies:
                target.copy_(source, non_blocking=True)

    def wait(self, stream: int) -> None:
        """Wait until a stream has done what was started."""
        if self._is_gpu:
            self._streams[stream].synchronize()


def buffers(num_bytes: int, device: torch.device) -> Copy:
    """Return random bytes on the device and in host memory, which is pinned beside a GPU."""
    there = random_numbers((num_bytes // 4,), device, torch.float32)
    return there, torch.empty_like(there, device="cpu", pin_memory=device.type == "cuda").copy_(there)


def measure_small_copies(sizes: Sizes) -> dict[str, Any]:
    """Measure how long a small copy to the device takes alone, and behind a layer's weights, whole and in pieces."""
    streams = Streams(sizes.torch_device)
    large, small = (buffers(count, sizes.torch_device) for count in (sizes.layer_bytes, sizes.small_bytes))

    def seconds(piece_bytes: int | None) -> tuple[float, float]:
        """Return the seconds until the small copy, and until both, were done."""
        begun = time.perf_counter()
        if piece_bytes is not None:
            streams.copy(0, list(zip(*(x.split(piece_bytes // 4) for x in large), strict=True)))
        streams.copy(1, [small])
        streams.wait(1)
        first = time.perf_counter() - begun
        streams.wait(0)
        return first, time.perf_counter() - begun

    found = {"alone": None, "behind a whole layer": sizes.layer_bytes}
    found |= {f"behind pieces of {count // MIB} MiB": count for count in sizes.piece_bytes}
    rows = []
    for name, piece_bytes in found.items():
        small_s, both_s = (min(each) for each in zip(*(seconds(piece_bytes) for _ in range(sizes.rounds + 1)), strict=True))
        rows.append({"small copy": name, "ms": small_s * 1e3, "ms for both": both_s * 1e3})
    return {"small copies": rows}


def measure_directions(sizes: Sizes) -> dict[str, Any]:
    """Measure the rates of both directions of the link, alone and together, in 10**9 bytes per second of each."""
    streams, device = Streams(sizes.torch_device), sizes.torch_device
    there, here = buffers(sizes.layer_bytes, device)
    from_there, to_here = buffers(sizes.layer_bytes, device)
    copies = {"to the device": [(there, here)], "to the host": [(to_here, from_there)]}

    def both() -> None:
        for stream, each in enumerate(copies.values()):
            streams.copy(stream, each)
        for stream in range(2):
            streams.wait(stream)

    def one(name: str) -> Callable[[], None]:
        def run() -> None:
            streams.copy(0, copies[name])
            streams.wait(0)

        return run

    rates = {name: sizes.layer_bytes / best_seconds(one(name), sizes.rounds) / 1e9 for name in copies}
    return {**rates, "each of both together": sizes.layer_bytes / best_seconds(both, sizes.rounds) / 1e9}


def best_seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the seconds of the fastest call, the first one left out."""
    work()
    fastest = math.inf
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest


def measure_copies(sizes: Sizes) -> dict[str, Any]:
    """Measure small copies and both directions."""
    return {**measure_directions(sizes), **measure_small_copies(sizes)}

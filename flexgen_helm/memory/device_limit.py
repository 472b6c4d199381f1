"""Limit of the memory that torch takes on a GPU, so that a user's `max_memory` holds whatever computing needs."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import torch

from flexgen_helm.memory.device import Device


class DeviceLimits:
    """Limits of this process on each GPU: together, engines take no more than their limits allow.

    torch knows one limit for all tensors of a process on a GPU. It is set while at least one engine has a limit: what the
    process held before the first engine, and the sum of the engines' limits. torch frees what it keeps unused before it lets an
    allocation fail at the limit.
    """

    def __init__(self) -> None:
        """Limit nothing."""
        self._lock = threading.Lock()
        self._limits: defaultdict[torch.device, list[float]] = defaultdict(list)
        self._before: dict[torch.device, tuple[int, float]] = {}
        """Bytes that were held, and the limit as a fraction of the GPU, before the first engine."""

    @contextmanager
    def hold(self, device: Device, most: int | None) -> Iterator[None]:
        """Keep an engine's limit for the body of a `with` statement.

        Args:
            device: The device that computes. Nothing is limited on a CPU.
            most: Most bytes that the engine may take; None: as many as are free.
        """
        if not device.is_gpu:
            yield
            return
        where, limit = device.torch_device, inf if most is None else float(most)
        with self._lock:
            if not self._limits[where]:
                held, fraction = torch.cuda.memory_allocated(where), torch.cuda.get_per_process_memory_fraction(where)
                self._before[where] = held, fraction
            self._limits[where].append(limit)
            self._set(where)
        try:
            yield
        finally:
            with self._lock:
                self._limits[where].remove(limit)
                self._set(where)

    def _set(self, where: torch.device) -> None:
        held, fraction = self._before[where]
        if self._limits[where]:
            fraction = min(fraction, (held + sum(self._limits[where])) / torch.cuda.mem_get_info(where)[1])
        torch.cuda.set_per_process_memory_fraction(fraction, where)


DEVICE_LIMITS = DeviceLimits()
"""The limits of this process, all engines of which share torch's allocator."""

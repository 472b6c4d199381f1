"""Buffers between host and device, used in turn so that one is filled while another travels."""

from __future__ import annotations

from concurrent.futures import Future, wait

import torch
from torch import Tensor

from flexgen_helm.kv_cache.pages import NUM_BUFFERS
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.device import Device


class StagingBuffer:
    """A piece of host memory, pinned for a GPU, with a twin on a device that has a memory of its own.

    Attributes:
        host: uint8 ``[bytes]``.
        twin: The same on the device; ``host`` itself where the device uses the host's memory.
    """

    def __init__(self, num_bytes: int, device: Device) -> None:
        self.host = allocate(num_bytes, pin=device.is_gpu)
        self.twin = torch.empty_like(self.host, device=device.torch_device) if device.own_memory else self.host
        self.futures: list[Future[None]] = []
        """Reads and writes of the host side that go on."""
        self._event = torch.cuda.Event() if device.is_gpu else None

    def to_device(self, num_bytes: int) -> None:
        """Start to copy the first bytes to the twin; work that the device does after it finds them there."""
        self._copy(self.host[:num_bytes], self.twin[:num_bytes])

    def to_host(self, num_bytes: int) -> None:
        """Start to copy the first bytes of the twin to the host; they are there after `finish`."""
        self._copy(self.twin[:num_bytes], self.host[:num_bytes])

    def _copy(self, source: Tensor, target: Tensor) -> None:
        if self.twin is not self.host:
            target.copy_(source, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def finish(self) -> None:
        """Wait until nothing is on its way in the buffer.

        Raises:
            OutOfSpace: Or any other error of a read or write, once.
        """
        futures, self.futures = self.futures, []
        wait(futures)
        for future in futures:
            future.result()
        if self._event is not None:
            self._event.synchronize()


class StagingRing:
    """`NUM_BUFFERS` buffers of the same size, used in turn."""

    def __init__(self, device: Device) -> None:
        """Nothing is allocated yet."""
        self._device = device
        self._buffers: list[StagingBuffer] = []
        self._turn = 0

    def next(self, num_bytes: int) -> StagingBuffer:
        """Wait for the buffer that was used longest ago and return it, with room for so many bytes."""
        if not self._buffers or len(self._buffers[0].host) < num_bytes:
            self.finish()
            self._buffers = []  # before the new ones are there
            self._buffers = [StagingBuffer(num_bytes, self._device) for _ in range(NUM_BUFFERS)]
        self._turn = (self._turn + 1) % NUM_BUFFERS
        buffer = self._buffers[self._turn]
        buffer.finish()
        return buffer

    def finish(self) -> None:
        """Wait for all buffers; raises like `StagingBuffer.finish`."""
        for buffer in self._buffers:
            buffer.finish()

    def abandon(self) -> None:
        """Wait for all buffers after a failure; raises nothing."""
        for buffer in self._buffers:
            wait(buffer.futures)
            buffer.futures = []

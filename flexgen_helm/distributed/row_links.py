"""Ways by which rows travel from a stage to the next one, as bytes: between CPUs, and between GPUs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flexgen_helm.distributed import channel
from flexgen_helm.distributed.channel import Delivery, Inlet
from flexgen_helm.distributed.group import StageGroup
from flexgen_helm.policy.stages.row_travel import Frames

CLOSE_SECONDS = 10.0
"""Seconds that a stage waits at its end for the stage before to say that no row comes any more."""


class RowLink(Protocol):
    """What brings rows from the stage before, and takes them to the stage behind. Both in their order."""

    @property
    def where(self) -> torch.device:
        """Device of the bytes."""

    def expect(self, sizes: Sequence[int]) -> None:
        """Hear of rows of so many bytes that will come; in any thread."""

    def receive(self) -> Tensor:
        """Wait for the next row and return its bytes.

        Raises:
            StageLost: If it never comes.
        """

    def send(self, row: Tensor) -> list[Delivery]:
        """Start to send a row."""

    def close(self) -> None:
        """Send and take nothing more. All stages must do it, in their order; another call does nothing."""


class CpuRows:
    """Rows between CPUs, over Gloo. They need not be expected: a thread takes them as they come."""

    def __init__(self, stages: StageGroup, frames: Frames) -> None:
        """Connect the stages once more; all stages must do it.

        Args:
            stages: The stages.
            frames: How rows travel.
        """
        self._stages, self._frames, self._group = stages, frames, stages.new_group("gloo")
        self._arrived: SimpleQueue[Tensor | None] = SimpleQueue()
        self.where = torch.device("cpu")
        self._thread: threading.Thread | None = None
        self._closed = False
        if not stages.is_first:
            with stages.noticing():
                inlet = Inlet(stages.index - 1, self._group, frames)
            self._thread = threading.Thread(target=self._take, args=(inlet,), name="flexgen-helm-rows", daemon=True)
            self._thread.start()

    def expect(self, sizes: Sequence[int]) -> None:
        """See `RowLink`."""

    def receive(self) -> Tensor:
        """See `RowLink`."""
        while True:
            try:
                row = self._arrived.get(timeout=1.0)
            except Empty:
                self._stages.raise_if_lost()
                continue
            if row is not None:
                return row
            with self._stages.noticing():
                raise RuntimeError("the stage before has closed the connection by which rows come")

    def send(self, row: Tensor) -> list[Delivery]:
        """See `RowLink`."""
        with self._stages.noticing():
            return channel.send(row, self._stages.index + 1, self._group, self._frames)

    def close(self) -> None:
        """See `RowLink`. Bytes of no length end the thread of the stage behind, which must not be in a call when that ends."""
        if self._closed or self._stages.is_broken:
            return
        self._closed = True
        if not self._stages.is_last:
            self._stages.wait_for(self.send(torch.empty(0, dtype=torch.uint8)))
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _take(self, inlet: Inlet) -> None:
        try:
            while len(row := inlet.take()):
                self._arrived.put(row)
        except RuntimeError:  # told by `receive`, if rows are still expected
            self._arrived.put(None)


class GpuRows:
    """Rows between GPUs, over NCCL, which are received when a sweep is ordered: what travels is announced by their sizes."""

    def __init__(self, stages: StageGroup, where: torch.device) -> None:
        """Connect the stages once more; all stages must do it.

        Args:
            stages: The stages.
            where: This stage's GPU.
        """
        self._stages, self._group, self.where = stages, stages.new_group("nccl"), where
        self._coming: deque[Delivery] = deque()

    def expect(self, sizes: Sequence[int]) -> None:
        """See `RowLink`."""
        for size in sizes:
            buffer = torch.empty(size, dtype=torch.uint8, device=self.where)
            with self._stages.noticing():
                work = dist.irecv(buffer, self._stages.index - 1, self._group)
            assert work is not None
            self._coming.append((work, buffer))

    def receive(self) -> Tensor:
        """See `RowLink`."""
        self._stages.wait_for([self._coming[0]])
        return self._coming.popleft()[1]

    def send(self, row: Tensor) -> list[Delivery]:
        """See `RowLink`."""
        with self._stages.noticing():
            work = dist.isend(row, self._stages.index + 1, self._group)
        assert work is not None
        return [(work, row)]

    def close(self) -> None:
        """See `RowLink`."""

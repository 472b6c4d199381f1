"""Bytes from one stage to another over Gloo, in as much time as the network needs and no round trip more.

Gloo sends when it knows that the receiver has posted a receive, and each receive takes one send. A receive that is posted when
something is expected therefore costs a round trip before every send. So the receiving end of a channel has several receives
posted at any time, and what is sent is cut into frames that fit them. A frame may be shorter than the receive that takes it.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from flexgen_helm.policy.stages.row_travel import LENGTH_BYTES, Frames

Delivery = tuple[dist.Work, Tensor]
"""What is being sent: its tensor must be kept until the work has ended."""


def send(content: Tensor, stage: int, group: dist.ProcessGroup, frames: Frames) -> list[Delivery]:
    """Start to send bytes.

    Args:
        content: uint8 ``[n]`` on the CPU; n may be 0.
        stage: Who receives.
        group: The process group, in which nothing else is sent to that stage.
        frames: How they travel.

    Raises:
        RuntimeError: If the connection is broken.
    """
    length = torch.tensor([content.numel()]).view(torch.uint8)
    parts = torch.cat([length, content]).split(frames.num_bytes)
    return [(_started(dist.isend(part, stage, group)), part) for part in parts]


class Inlet:
    """The receiving end of a channel. One thread uses it."""

    def __init__(self, stage: int, group: dist.ProcessGroup, frames: Frames) -> None:
        """Post receives.

        Args:
            stage: Who sends.
            group: The process group, in which nobody else receives from that stage.
            frames: How bytes travel.

        Raises:
            RuntimeError: If the connection is broken.
        """
        self._stage, self._group = stage, group
        self._posted: deque[Delivery] = deque()
        for _ in range(frames.window):
            self._post(torch.empty(frames.num_bytes, dtype=torch.uint8))

    def take(self) -> Tensor:
        """Wait for what was sent next, and return its bytes, uint8 ``[n]``.

        Raises:
            RuntimeError: If the connection breaks.
        """
        frame = self._next()
        content = torch.empty(int(frame[:LENGTH_BYTES].view(torch.int64)), dtype=torch.uint8)
        done = _fill(content, 0, frame[LENGTH_BYTES:])
        self._post(frame)
        while done < len(content):
            frame = self._next()
            done = _fill(content, done, frame)
            self._post(frame)
        return content

    def _next(self) -> Tensor:
        work, frame = self._posted.popleft()
        work.wait()
        return frame

    def _post(self, frame: Tensor) -> None:
        self._posted.append((_started(dist.irecv(frame, self._stage, self._group)), frame))


def _fill(content: Tensor, done: int, frame: Tensor) -> int:
    """Copy a frame behind the bytes that are there, as far as there is room; returns the bytes that are there then."""
    end = min(len(content), done + len(frame))
    content[done:end] = frame[: end - done]
    return end


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work

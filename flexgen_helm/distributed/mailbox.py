"""Messages between two stages over a process group on CPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from flexgen_helm.distributed.messages import FIRST_BYTES, Message, bytes_missing, message_of, tensors_of

Delivery = tuple[dist.Work, Tensor]


def send(message: Message, stage: int, group: dist.ProcessGroup) -> list[Delivery]:
    """Start to send a message to a stage; its tensors must be kept until they are delivered."""
    return [(_started(dist.isend(tensor, stage, group)), tensor) for tensor in tensors_of(message)]


def listen(
    stage: int, group: dist.ProcessGroup, on_message: Callable[[Message], bool], on_broken: Callable[[RuntimeError], None]
) -> threading.Thread:
    """Take messages from a stage in a thread of its own, which is returned.

    Args:
        stage: Who sends.
        group: The process group, in which nobody else takes from that stage.
        on_message: Called in the thread with each message; returns whether there may be another.
        on_broken: Called in the thread if the connection breaks, which ends it.
    """

    def take() -> None:
        try:
            while on_message(_next(stage, group)):
                pass
        except RuntimeError as error:
            on_broken(error)

    thread = threading.Thread(target=take, name=f"flexgen-helm-stage-{stage}", daemon=True)
    thread.start()
    return thread


def _next(stage: int, group: dist.ProcessGroup) -> Message:
    first = torch.empty(FIRST_BYTES, dtype=torch.uint8)
    dist.recv(first, stage, group)
    missing = bytes_missing(first)
    if not missing:
        return message_of(first, None)
    second = torch.empty(missing, dtype=torch.uint8)
    dist.recv(second, stage, group)
    return message_of(first, second)


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work

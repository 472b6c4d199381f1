"""Messages between two stages over a process group on CPUs."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch.distributed as dist

from flexgen_helm.distributed import channel
from flexgen_helm.distributed.channel import Delivery, Inlet
from flexgen_helm.distributed.messages import Message, bytes_of, message_of
from flexgen_helm.policy.stages.row_travel import Frames

FRAMES = Frames(2**14, 64)
"""Most messages are one frame; those that order sweeps of hundreds of sequences are a few."""


def send(message: Message, stage: int, group: dist.ProcessGroup) -> list[Delivery]:
    """Start to send a message to a stage; its tensors must be kept until they are delivered."""
    return channel.send(bytes_of(message), stage, group, FRAMES)


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
    inlet = Inlet(stage, group, FRAMES)

    def take() -> None:
        try:
            while on_message(message_of(inlet.take())):
                pass
        except RuntimeError as error:
            on_broken(error)

    thread = threading.Thread(target=take, name=f"flexgen-helm-stage-{stage}", daemon=True)
    thread.start()
    return thread

"""The device: the processor that multiplies the matrices, and whether it has a memory of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from flexgen_helm.errors import FlexGenError


@dataclass(frozen=True)
class Device:
    """The device tier: a GPU, or the CPU when there is none.

    Attributes:
        torch_device: The torch device that multiplies the matrices.
        own_memory: Whether the device has a memory apart from the host's. A GPU always has. Tests set it for a CPU too, which
            then takes every path that a GPU takes.
    """

    torch_device: torch.device
    own_memory: bool = False

    def __post_init__(self) -> None:
        if self.is_gpu and not self.own_memory:
            object.__setattr__(self, "own_memory", True)

    @property
    def is_gpu(self) -> bool:
        """Whether transfers need pinned memory, streams and events."""
        return self.torch_device.type == "cuda"

    def current(self) -> AbstractContextManager[object]:
        """Make a GPU the current one of this thread for the body of a `with` statement.

        Each thread has its own current GPU, on which libraries launch their kernels.
        """
        return torch.cuda.device(self.torch_device) if self.is_gpu else nullcontext()


CPU = Device(torch.device("cpu"))
"""The CPU, which uses the host's memory."""


def resolve_device(given: str | Device) -> Device:
    """Return the device for a name: "auto", "cpu", "cuda" or "cuda:N".

    Args:
        given: The name, or a `Device`. A GPU without a number is the current one of this thread; the result has its number,
            because other threads may have another current GPU.

    Raises:
        FlexGenError: If the name is unknown, or torch does not see the GPU.
    """
    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = given if isinstance(given, Device) else Device(torch.device(given))
    except RuntimeError:
        raise FlexGenError(f"device is {given!r}. Give 'auto', 'cpu', 'cuda' or 'cuda:N'.") from None
    if not device.is_gpu:
        return device
    if not torch.cuda.is_available():
        raise FlexGenError("device is 'cuda', but torch sees no CUDA GPU on this machine. Use device='cpu'.")
    index, count = device.torch_device.index, torch.cuda.device_count()
    if index is not None and index >= count:
        raise FlexGenError(f"device is 'cuda:{index}', but torch sees GPUs 0 to {count - 1}. Give the number of one of them.")
    return Device(torch.device("cuda", torch.cuda.current_device() if index is None else index))

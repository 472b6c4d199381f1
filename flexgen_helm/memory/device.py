"""The device: the processor that multiplies the matrices, and whether it has a memory of its own."""

from __future__ import annotations

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


CPU = Device(torch.device("cpu"))
"""The CPU, which uses the host's memory."""


def resolve_device(given: str | Device) -> Device:
    """Return the device for a name: "auto", "cpu", "cuda" or "cuda:N". A `Device` is returned unchanged.

    Raises:
        FlexGenError: If the name is unknown, or torch sees no CUDA GPU.
    """
    if isinstance(given, Device):
        return given
    if given == "auto":
        return Device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(given)
    except RuntimeError:
        raise FlexGenError(f"device is {given!r}. Give 'auto', 'cpu', 'cuda' or 'cuda:N'.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FlexGenError("device is 'cuda', but torch sees no CUDA GPU on this machine. Use device='cpu'.")
    return Device(device)

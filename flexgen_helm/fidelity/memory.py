"""Memory of two engines in one process: half of every limit for each."""

from __future__ import annotations

from pathlib import Path

from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.memory.amounts import MaxMemory, parse_max_memory
from flexgen_helm.memory.device import Device
from flexgen_helm.runtime.free_space import free_space
from flexgen_helm.types import Tier


def halves(given: MaxMemory | None, device: Device, folder: Path | None = None) -> dict[Tier, int]:
    """Return the limits of one of two engines.

    Args:
        given: Limits of the user. A memory without one is limited to half of what is free now; the disk is not, since an engine
            measures what the other has left of it.
        device: The device that computes.
        folder: Folder for everything on disk; None: in the cache folder.

    Raises:
        PolicyError: If a limit cannot be understood.
    """
    limits = parse_max_memory(given)
    free = free_space(device, folder or cache_folder())
    if device.own_memory:
        limits = {"device": free["device"], "host": free["host"], **limits}
    elif not {"device", "host"} & limits.keys():  # one memory, of which the limits are a sum
        limits = {"host": free["host"], **limits}
    return {tier: count // 2 for tier, count in limits.items()}

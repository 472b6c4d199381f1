"""How much of each tier is free for an engine now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.usage import free_bytes, free_disk_bytes
from flexgen_helm.policy.space import Space
from flexgen_helm.types import TIERS, Tier

PROCESS_BYTES = 128 * 2**20
"""Memory of threads, of the workspaces of libraries, and of what allocators do not give back."""


def measure_space(device: Device, limits: Mapping[Tier, int], folder: Path) -> Space:
    """Return what may be used of each tier: what is free, and no more than the user allows.

    Args:
        device: Where the matrices are multiplied.
        limits: Most bytes of the tiers that the user names.
        folder: For everything on disk; it may not exist. Slabs that are there already need no more space.

    Raises:
        PolicyError: If the folder cannot be used.
    """
    own_memory, free = device.own_memory, free_space(device, folder)
    free["disk"] += sum(path.stat().st_blocks * 512 for path in folder.glob("*.slab"))
    available = {tier: min(count, limits.get(tier, count)) for tier, count in free.items()}
    if not own_memory and {"device", "host"} & limits.keys():
        ram = limits.get("device", 0) + limits.get("host", 0)
        available["device"] = available["host"] = min(free["host"], ram)
    return Space(available, own_memory, limits)


def free_space(device: Device, folder: Path) -> dict[Tier, int]:
    """Return the bytes of each tier that are free now, without what any process takes as it goes on."""
    host = free_bytes(CPU.torch_device)
    free: dict[Tier, int] = {"device": free_bytes(device.torch_device), "host": host, "disk": free_disk_bytes(folder)}
    return free | {tier: max(0, free[tier] - PROCESS_BYTES) for tier in TIERS[:2]}


def make_folder(folder: Path) -> None:
    """Make the offload folder.

    Raises:
        FlexGenError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlexGenError(f"offload_folder {folder} cannot be created ({error}). Give another folder.") from error

"""Free space: the bytes of each tier that an engine may use now."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from flexgen_helm.attention.chunks import GATHERED_BYTES
from flexgen_helm.errors import FlexGenError
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.usage import free_bytes, free_disk_bytes, total_bytes
from flexgen_helm.policy.space import Space
from flexgen_helm.types import Tier

PROCESS_BYTES = 128 * 2**20
"""Bytes reserved for threads, for workspaces of libraries, and for memory that allocators do not return."""
GPU_PROCESS_BYTES = 512 * 2**20
"""The same on a GPU, where kernels take memory as they are loaded too."""
GATHER_COPIES = 3
"""Copies of the K and V that attention on a GPU gathers at a time: in 16 bits as they are stored, and in fp32."""


def measure_space(device: Device, limits: Mapping[Tier, int], folder: Path) -> Space:
    """Return the bytes of each tier that may be used: the free bytes, but no more than the user allows.

    Args:
        device: The device that computes.
        limits: Most bytes of the tiers that the user names.
        folder: Folder for everything on disk; it may not exist. Slabs that it already holds count as free space.

    Raises:
        PolicyError: If the folder cannot be used.
    """
    free = free_space(device, folder)
    free["disk"] += sum(path.stat().st_blocks * 512 for path in folder.glob("*.slab"))
    return replace(_limited(free, device, limits), folder=str(folder))


def whole_machine(device: Device, limits: Mapping[Tier, int]) -> Space:
    """Return the bytes of each tier that the machine has and the user allows, taken or not. The disk is unlimited.

    Args:
        device: The device that computes.
        limits: Most bytes of the tiers that the user names.
    """
    on_device, host = (total_bytes(where) for where in (device.torch_device, CPU.torch_device))
    return _limited({**_without_reserve(device, on_device, host), "disk": sys.maxsize}, device, limits)


def free_space(device: Device, folder: Path) -> dict[Tier, int]:
    """Return the bytes of each tier that are free now, minus a reserve for the process itself.

    Args:
        device: The device that computes.
        folder: Folder for everything on disk; it may not exist.
    """
    on_device, host = (free_bytes(where) for where in (device.torch_device, CPU.torch_device))
    return {**_without_reserve(device, on_device, host), "disk": free_disk_bytes(folder)}


def _without_reserve(device: Device, on_device: int, host: int) -> dict[Tier, int]:
    reserve = GPU_PROCESS_BYTES if device.is_gpu else PROCESS_BYTES
    return {"device": max(0, on_device - reserve), "host": max(0, host - PROCESS_BYTES)}


def _limited(found: Mapping[Tier, int], device: Device, limits: Mapping[Tier, int]) -> Space:
    available = {tier: min(count, limits.get(tier, count)) for tier, count in found.items()}
    if not device.own_memory and {"device", "host"} & limits.keys():
        ram = limits.get("device", 0) + limits.get("host", 0)
        available["device"] = available["host"] = min(found["host"], ram)
    scratch = GATHER_COPIES * GATHERED_BYTES if device.is_gpu else 0
    return Space(available, device.own_memory, limits, is_gpu=device.is_gpu, scratch_bytes=scratch)


def make_folder(folder: Path) -> None:
    """Make the offload folder.

    Raises:
        FlexGenError: If the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlexGenError(f"offload_folder {folder} cannot be created ({error}). Give another folder.") from error

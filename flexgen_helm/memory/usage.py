"""Free memory of the machine, and memory in use by this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from flexgen_helm.errors import PolicyError


class _Files(NamedTuple):
    """File names of one version of memory cgroups, and its names for the page cache in memory.stat."""

    folder: str
    limit: str
    used: str
    prefix: str
    mapped: str


VERSION_1 = _Files("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_", "mapped_file")
VERSION_2 = _Files("", "memory.max", "memory.current", "", "file_mapped")


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Return the bytes of a device's memory that may still be allocated; limits of memory cgroups count.

    On a GPU, memory that torch has taken and does not use counts as free.

    Args:
        device: A GPU, or the CPU.
        root: Folder that contains /proc and /sys.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return max(0, min([_meminfo(root)["MemAvailable"], *(group.free for group in _cgroups(root))]))


def total_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Return the bytes of a device's memory, taken or not; limits of memory cgroups count.

    Args:
        device: A GPU, or the CPU.
        root: Folder that contains /proc and /sys.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return min([_meminfo(root)["MemTotal"], *(group.limit for group in _cgroups(root))])


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet.

    Raises:
        PolicyError: If the system cannot say.
    """
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise PolicyError(f"offload_folder {folder} cannot be used ({error}). Give another folder.") from error


def used_bytes(device: torch.device) -> int:
    """Return the bytes in use now: taken by torch on a GPU, whether it uses them or not, else resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class PeakBytes:
    """The most bytes in use since the measuring began. torch notes them itself on a GPU; on a CPU they are sampled."""

    def __init__(self, device: torch.device) -> None:
        """Begin to measure.

        Args:
            device: A GPU, or the CPU.
        """
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.begun = self._most = used_bytes(device)
        """Bytes in use when the measuring began."""

    def sample(self) -> None:
        """Measure now, where nobody else does; cheap enough for every operation."""
        if self._device.type != "cuda":
            self._most = max(self._most, used_bytes(self._device))

    def bytes(self) -> int:
        """Return the most bytes that were in use."""
        return int(torch.cuda.max_memory_reserved(self._device)) if self._device.type == "cuda" else self._most


def _meminfo(root: Path) -> dict[str, int]:
    """Return what the kernel says of the machine's memory, in bytes."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


class _Group(NamedTuple):
    """Bytes of a memory cgroup with a limit."""

    limit: int
    free: int


def _cgroups(root: Path) -> Iterator[_Group]:
    """Yield this process's cgroup and all cgroups above it, whose limits apply too, as far as they have a limit.

    A container may see the path that its cgroup has outside of it; only the mount itself exists of such a path.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        files = VERSION_2 if number == "0" else VERSION_1
        mount = root / "sys/fs/cgroup" / files.folder
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield from _group(folder, files)


def _group(folder: Path, files: _Files) -> Iterator[_Group]:
    try:
        limit, used = ((folder / name).read_text().strip() for name in (files.limit, files.used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return  # the root of version 2, or a group that is not visible here
    if limit != "max":
        inactive, active, mapped = (
            int(stat.get(files.prefix + name, 0)) for name in ("inactive_file", "active_file", files.mapped)
        )
        # Mapped files may be the program itself, which would be read again and again.
        yield _Group(int(limit), int(limit) - int(used) + max(inactive, inactive + active - mapped))

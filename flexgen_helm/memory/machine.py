"""Memory at hand, and how much of it this process holds."""

from __future__ import annotations

from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken where the matrices are multiplied, in bytes; a memory cgroup's limit counts."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()}
    return min(fields["MemAvailable"], _cgroup_free())


def used_bytes(device: torch.device) -> int:
    """Memory in use now, in bytes: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _cgroup_free() -> int:
    root = Path("/sys/fs/cgroup")
    try:
        relative = Path("/proc/self/cgroup").read_text().strip().rsplit(":", 1)[-1].lstrip("/")
        limit = (root / relative / "memory.max").read_text().strip()
        used = int((root / relative / "memory.current").read_text())
    except OSError:
        return 1 << 62
    return 1 << 62 if limit == "max" else int(limit) - used

"""Amounts of memory: parse those that a user gives, and format those that a message shows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from flexgen_helm.errors import PolicyError
from flexgen_helm.types import TIERS, Tier

PAGE = 4096
"""Bytes of a memory page: direct I/O needs addresses, offsets and lengths that are multiples of it."""
LARGE_TENSOR_BYTES = 2**20
"""Tensors of so many bytes get memory of their own while a CPU streams weights (`flexgen_helm.memory.allocator`)."""
UNITS = {
    "": 1,
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
}
"""Bytes for each suffix that *accelerate* knows: GiB is 2**30, GB is 10**9."""
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]*)\s*")

MaxMemory = Mapping[str, int | str]
"""Most bytes of each tier, such as ``{"device": "15GiB", "host": "100GiB"}``; a tier without an entry may use what is free."""


def parse_size(size: int | str) -> int:
    """Return a number of bytes, from a number or a text such as "15GiB" or "500 MB".

    Raises:
        PolicyError: If it is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = SIZE.fullmatch(str(size).upper())
    if found is None or found[2] not in UNITS:
        raise PolicyError(f"{size!r} is not an amount of memory. Give bytes as a number, or a text such as '15GiB' or '500MB'.")
    return int(float(found[1]) * UNITS[found[2]])


def parse_max_memory(given: MaxMemory | None) -> dict[Tier, int]:
    """Return the most bytes of each tier that the user names.

    Raises:
        PolicyError: If a tier does not exist or an amount cannot be understood.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or set(given) - set(TIERS):
        raise PolicyError(
            f"max_memory is {given!r}. Give amounts for some of {', '.join(TIERS)}, such as {{'device': '15GiB'}}."
        )
    return {tier: parse_size(given[tier]) for tier in TIERS if tier in given}


def gib(num_bytes: float, *, up: bool = False) -> str:
    """Return a number of bytes as text for messages, such as "1.50 GiB".

    Args:
        num_bytes: Number of bytes.
        up: Whether to round up. A user who allows what a message asks for must not be refused again.
    """
    if num_bytes < 1:
        return "0 bytes"
    power, digits = (3, 2) if num_bytes >= 2**30 / 10 else (2, 1) if num_bytes >= 2**20 / 10 else (1, 1)
    shown = num_bytes / 1024**power * 10**digits
    return f"{(math.ceil(shown) if up else shown) / 10**digits:.{digits}f} {'KMG'[power - 1]}iB"


def padded(num_bytes: int) -> int:
    """Round a number of bytes up to whole pages."""
    return -(-num_bytes // PAGE) * PAGE

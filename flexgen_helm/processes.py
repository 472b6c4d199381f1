"""The processes that a launcher such as `torchrun` started, by its environment variables. No torch."""

from __future__ import annotations

import os

LOCAL_RANK, LOCAL_COUNT = "LOCAL_RANK", "LOCAL_WORLD_SIZE"
"""Number of a process on its host, and number of all processes there."""
DRIVES = "FLEXGEN_HELM_PIPELINE"
"""Set where engines are divided into stages: a file that is written once the stages have met."""


def num_processes() -> int:
    """Return the number of processes that were started together; 1: this one alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_follower() -> bool:
    """Return whether this process follows the first one."""
    return num_processes() > 1 and os.environ.get("RANK", "0") != "0"


def local_rank() -> int:
    """Return the number of this process on its host."""
    return int(os.environ.get(LOCAL_RANK, "0"))


def num_local(default: int) -> int:
    """Return the number of processes on this host.

    Args:
        default: The number if no launcher tells.
    """
    return int(os.environ.get(LOCAL_COUNT, default))


class Terminated(SystemExit):
    """SIGTERM, which a launcher sends to all processes when one has failed."""

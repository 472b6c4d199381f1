"""Processes that are the stages of a pipeline behind the test's own, as `torchrun` would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from flexgen_helm.processes import DRIVES
from flexgen_helm.runtime.pipeline.launch import begin_to_drive, met_group

FOLLOW = "import sys; from flexgen_helm.runtime.pipeline.launch import follow_first; sys.exit(follow_first())"
"""What a stage behind the first runs."""


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Returns the variables that `torchrun` sets."""
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextmanager
def pipeline(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Makes this process the first of ``count`` stages, for the body of a `with` statement; yields the others."""
    port = free_port()
    others = [
        subprocess.Popen(
            [sys.executable, "-c", FOLLOW],
            env={**os.environ, **environment(rank, count, port)},
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank in range(1, count)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(0, count, port).items():
            patch.setenv(name, value)
        begin_to_drive()
        try:
            group = met_group()
            yield others
            group.end()
        finally:
            os.environ.pop(DRIVES, None)
            met_group.cache_clear()
            for process in others:
                process.kill()
                process.communicate()
            if dist.is_initialized():  # a stage was lost
                dist.destroy_process_group()

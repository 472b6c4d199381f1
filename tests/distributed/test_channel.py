"""Bytes over a channel: of any length, also longer than all frames for which the receiver is ready, in their order."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.distributed.stages import environment, free_port

CODE = """
import torch, torch.distributed as dist
from flexgen_helm.distributed.channel import Inlet, send
from flexgen_helm.policy.stages.row_travel import Frames

dist.init_process_group("gloo")
group, frames, rank = dist.group.WORLD, Frames(64, 8), dist.get_rank()
inlet = Inlet(1 - rank, group, frames)
lengths = [0, 1, 55, 56, 57, 64, 120, 121, 1000, 0, 5, *range(40)]
numbers = torch.Generator().manual_seed(3)
sent = [torch.randint(256, (length,), dtype=torch.uint8, generator=numbers) for length in lengths]
if rank == 0:
    leaving = [delivery for each in sent for delivery in send(each, 1, group, frames)]
    found = [inlet.take() for _ in sent]
    for work, _ in leaving:
        work.wait()
    print(all(map(torch.equal, found, sent)), len(leaving) > 2 * frames.window)
else:
    for _ in sent:
        for work, _ in send(inlet.take(), 0, group, frames):
            work.wait()
dist.barrier()
"""


@pytest.mark.slow
def test_what_is_sent_arrives_whole_and_in_order() -> None:
    port = free_port()
    command = [sys.executable, "-c", CODE]
    with subprocess.Popen(command, env={**os.environ, **environment(1, 2, port)}) as other:
        try:
            first = subprocess.run(
                command,
                env={**os.environ, **environment(0, 2, port)},
                capture_output=True,
                text=True,
                timeout=200,
                check=False,
            )
            assert (first.returncode, first.stdout.split()) == (0, ["True", "True"]), first.stderr
            assert other.wait(timeout=60) == 0
        finally:
            other.kill()

"""Slabs are read ahead in the cycle in which layers come."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.read_ahead import ReadAhead

SLABS = (0, 2, 3, 5, 6)
SIZE = 4096


class Source:
    """Slabs filled with their numbers."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read(self, j: int, into: Tensor) -> Future[None]:
        self.reads.append(j)
        into.fill_(j)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self) -> None:
        pass


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 5])
def test_each_slab_is_read_once_a_sweep_and_ahead_of_its_use(num_buffers: int) -> None:
    source = Source()
    sizes = dict.fromkeys(SLABS, SIZE)
    ring = ReadAhead(source, sizes, num_buffers=num_buffers, pin=False, meter=Meter(torch.device("cpu")))
    for sweep in range(3):
        for place, j in enumerate(SLABS):
            ring.free_all()
            ring.start_from(j)
            assert ring.take(j)[0] == j
            ring.free(j)
            ring.start_behind(j)
            # Everything up to the last slab that was read ahead, also over the end of the sweep, was read once, in order.
            used = sweep * len(SLABS) + place + 1
            expected = [SLABS[i % len(SLABS)] for i in range(used + num_buffers)]
            if num_buffers < len(SLABS):
                assert source.reads == expected
            else:
                assert source.reads == list(SLABS)

"""Counts what the device is asked to do for each operation of a sweep, by engines that overlap nothing."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flexgen_helm.attention.paged.plan import TilePlan
from flexgen_helm.attention.writes import Stores
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.execution.sweep_run import SweepRun
from flexgen_helm.kv_cache.pages import CHUNK_TOKENS
from flexgen_helm.schedule.operations import Operation
from flexgen_helm.schedule.rows import Row
from tests.simulated_gpu.gpu import Event, SimulatedGpu, Size
from tests.simulated_gpu.tensors import GpuTensor, content_of

KERNEL = "paged_attention"
"""What the log calls the kernel."""


@dataclass(frozen=True)
class Counts:
    """What the device is asked to do.

    Attributes:
        launches: Kernels, by whatever thread.
        copies: Copies between host and device, by whatever thread.
        waits: Waits for the device of the thread that computes.
        kernels: How much each kernel does.
        up: Bytes from the host to the device.
        down: Bytes from the device to the host.
    """

    launches: int = 0
    copies: int = 0
    waits: int = 0
    kernels: tuple[Size, ...] = ()
    up: int = 0
    down: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in Counts.__annotations__))

    @property
    def num_bytes(self) -> int:
        """Bytes that kernels read and write."""
        return sum(size.num_bytes for size in self.kernels)

    @classmethod
    def of(cls, events: Iterable[Event], thread: str) -> Counts:
        """Count events; waits of other threads than the one named hold nobody up but themselves."""
        events = list(events)
        kinds = [event.kind for event in events]
        kernels = tuple(event.size for event in events if event.kind == "launch")
        ways = {
            way: sum(event.size.num_bytes for event in events if event.kind == "copy" and event.what.startswith(way))
            for way in ("h2d", "d2h")
        }
        waits = sum(event.kind == "wait" and event.thread == thread for event in events)
        return cls(kinds.count("launch"), kinds.count("copy"), waits, kernels, ways["h2d"], ways["d2h"])


@dataclass
class Ledger:
    """Counts of a run: of each row in each layer, and of the weights of each layer."""

    rows: dict[int, list[Row]] = field(default_factory=lambda: defaultdict(list))
    """Rows of each sweep in their order."""
    cells: dict[tuple[int, int, int], Counts] = field(default_factory=lambda: defaultdict(Counts))
    """By sweep, row and layer."""
    weights: dict[int, Counts] = field(default_factory=dict)
    """By layer; none where weights stay on the device."""


@contextmanager
def counted(gpu: SimulatedGpu) -> Iterator[Ledger]:
    """Count the operations of all sweeps in the body of a `with` statement.

    Engines must overlap nothing, so that whatever is asked for during an operation, by whatever thread, belongs to it.
    """
    ledger, perform, run_sweep = Ledger(), SerialExecutor._perform, SerialExecutor._run_sweep

    def running(self: SerialExecutor[Any], run: SweepRun[Any], *others: Any) -> None:
        ledger.rows[len(ledger.rows)] = run._sweep.rows
        run_sweep(self, run, *others)

    def performing(self: SerialExecutor[Any], run: SweepRun[Any], operation: Operation) -> None:
        first = len(gpu.log)
        perform(self, run, operation)
        counts = Counts.of(gpu.log[first:], threading.current_thread().name)
        if operation.kind == "load_weights":
            ledger.weights[operation.j] = counts
        elif operation.kind in ("load_cache", "compute", "store_cache"):
            ledger.cells[len(ledger.rows) - 1, operation.k, operation.j] += counts

    with patch.object(SerialExecutor, "_perform", performing), patch.object(SerialExecutor, "_run_sweep", running):
        yield ledger


def as_one_kernel(plan: TilePlan, q: Tensor, stores: Stores, *places: Any, **options: Any) -> Tensor:
    """What the Triton kernel asks of the device, without its result: room for outputs, and one launch.

    Pages that several tiles read count once, since tiles of a sequence run side by side and share the cache of the device.
    """
    assert isinstance(q, GpuTensor)
    page_format = next(iter(stores["exact"].values())).format
    outputs = torch.zeros(*q.shape[:2], page_format.v.dim, dtype=q.dtype, device=q.device)
    visits = content_of(plan.visits)
    pages = len(torch.stack([visits[:, 2:6], visits[:, 6:10]], dim=-1).flatten(0, 1).unique(dim=0))
    num_bytes = pages * (page_format.k.num_bytes + page_format.v.num_bytes) + q.nbytes + outputs.nbytes
    keys, queries, dim = len(visits) * CHUNK_TOKENS, plan.size * q.shape[1], q.shape[2]
    size = Size(num_bytes, ((queries, 2 * dim), (2 * dim, keys)), q.element_size())  # scores, and weighted values
    q.memory.gpu.run("launch", KERNEL, [], [], size=size)
    return outputs


def operations(size: Size) -> float:
    """Floating-point operations of a kernel; 0 where it is no product."""
    if not size.shapes:
        return 0.0
    if len(size.shapes[-1]) == len(size.shapes[-2]) == 4:  # attention in one kernel: scores, and weighted values
        queries, keys = size.shapes[0], size.shapes[1]
        return 4.0 * math.prod(queries) * keys[-2]
    left, right = size.shapes[-2], size.shapes[-1]
    return 2.0 * math.prod(left) * right[-1]

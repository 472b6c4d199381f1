"""Measure what an executor takes for its operations by themselves, with rows that compute and move nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexgen_helm.execution.overlapped import OverlappedExecutor
from flexgen_helm.machine.rounds import Rounds, seconds_of
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.schedule.operations import sweep_operations
from flexgen_helm.schedule.rows import Row, Sweep

NUM_LAYERS, NUM_ROWS = 32, 4


def operation_seconds(device: Device) -> Rounds:
    """Return the seconds of an operation in each round.

    Args:
        device: The device.
    """
    executor = OverlappedExecutor(_NothingToCompute(), head_slice=1, meter=Meter(device.torch_device))
    sweep = Sweep([Row("decode", 1) for _ in range(NUM_ROWS)])
    count = sum(1 for _ in sweep_operations("zigzag", NUM_LAYERS, NUM_ROWS, streamed=frozenset(), num_slots=0))

    def run() -> None:
        executor.run(sweep, lambda requests, logits: None, lambda operation: None)

    rounds = seconds_of(run, device.torch_device, threads=1)
    return Rounds([each / count for each in rounds.wall], [each / count for each in rounds.processor])


@dataclass
class _Recorded:
    hidden_moves = True
    hidden: Tensor | None = field(default_factory=lambda: torch.zeros(1, 1, 1))
    tokens: Tensor = field(default_factory=lambda: torch.zeros(1, 1))


class _NothingToCompute:
    num_layers = NUM_LAYERS
    can_be_halved = False

    def reserve(self, sweep: Sweep) -> None: ...

    def record(self, row: Row) -> _Recorded:
        return _Recorded()

    def load_cache(self, j: int, recording: _Recorded) -> None: ...

    def replay(self, j: int, recording: _Recorded) -> None: ...

    def store_cache(self, j: int, recording: _Recorded) -> None: ...

    def use_suspender(self, suspend: Callable[[], None]) -> None: ...

    def bad_tokens(self, recording: _Recorded) -> None: ...

    def finish(self, hidden: Tensor) -> Tensor:
        return hidden

    def close(self) -> None: ...

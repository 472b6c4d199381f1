"""The serial executor: runs a sweep's operations one after the other. It is the specification of every faster one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from flexgen_helm.runtime.recorder import Recording
from flexgen_helm.schedule.operations import ORDERS, Operation, Order
from flexgen_helm.schedule.rows import Row, Sweep, Want

LogitsHandler = Callable[[list[Want], Tensor], None]
"""Gets the wants of a slice of the output head and their logits ``[len(wants), vocab]`` in fp32."""


class Rows(Protocol):
    """A model as it computes rows of one kind."""

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through."""

    def reserve(self, sweep: Sweep) -> None:
        """Make room for what a sweep stores."""

    def record(self, row: Row) -> Any:
        """Note how the layers would be called for a row; returns the `Recording` that `replay` takes."""

    def replay(self, j: int, recording: Any) -> None:
        """Run layer j on a recorded row."""

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[P, ...]`` of the last layer, of any rows, to logits ``[P, vocab]``."""


class SerialExecutor:
    """Computes sweeps."""

    def __init__(self, rows: Rows, *, head_slice: int, order: Order = "zigzag") -> None:
        """The output head works on ``head_slice`` positions at a time, always: row sizes are numerics."""
        self._rows, self._head_slice, self._order = rows, head_slice, order
        self._loaded_layer = -1

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through in a sweep."""
        return self._rows.num_layers

    def run(self, sweep: Sweep, on_logits: LogitsHandler, on_operation: Callable[[Operation], None] | None = None) -> None:
        """Compute all rows of a sweep, then the logits that they want.

        Args:
            sweep: What to compute.
            on_logits: Called for each slice of the output head.
            on_operation: Called after each operation; an exception from it ends the sweep.
        """
        with torch.inference_mode():
            self._rows.reserve(sweep)
            recordings: list[Recording] = [self._rows.record(row) for row in sweep.rows]
            for operation in ORDERS[self._order](self.num_layers, len(recordings)):
                self._run(operation, recordings)
                if on_operation is not None:
                    on_operation(operation)
            wanted: list[tuple[Want, Tensor]] = []
            for row, recording in zip(sweep.rows, recordings, strict=True):
                tokens = recording.tokens
                wanted += [(want, tokens[want.offset]) for want in row.wants()]
            for slice_ in _slices(wanted, self._head_slice):
                on_logits([want for want, _ in slice_], self._logits(slice_))

    def _run(self, operation: Operation, recordings: list[Recording]) -> None:
        if operation.kind == "load_weights":
            self._loaded_layer = operation.j
            return
        assert operation.j == self._loaded_layer, f"layer {operation.j} is computed while {self._loaded_layer} is loaded"
        self._rows.replay(operation.j, recordings[operation.k])

    def _logits(self, wanted: list[tuple[Want, Tensor]]) -> Tensor:
        hidden = torch.stack([token for _, token in wanted])
        padded = hidden.new_zeros(self._head_slice, *hidden.shape[1:])
        padded[: len(wanted)] = hidden
        return self._rows.finish(padded)[: len(wanted)].float()


def _slices(items: list[tuple[Want, Tensor]], size: int) -> Iterator[list[tuple[Want, Tensor]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

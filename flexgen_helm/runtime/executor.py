"""Executors run a sweep's operations in their order. The serial one is the specification; the overlapped one is the product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flexgen_helm.memory.hidden import HiddenStore
from flexgen_helm.runtime.recorder import Recording
from flexgen_helm.schedule.operations import Operation, Order, sweep_operations
from flexgen_helm.schedule.rows import Row, Sweep, Want

if TYPE_CHECKING:
    from flexgen_helm.memory.weights import WeightStore

LogitsHandler = Callable[[list[Want], Tensor], None]
"""Gets the wants of a slice of the output head and their logits ``[len(wants), vocab]`` in fp32."""


class Waitable(Protocol):
    """Something that was started."""

    def wait(self) -> None:
        """Wait for its end; raises what went wrong."""


class Rows(Protocol):
    """A model as it computes rows of one kind."""

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through."""

    def reserve(self, sweep: Sweep) -> None:
        """Make room for what a sweep stores."""

    def record(self, row: Row) -> Any:
        """Note how the layers would be called for a row; returns the `Recording` that `replay` takes."""

    def load_cache(self, j: int, recording: Any) -> Waitable | None:
        """Start to bring what layer j needs of a row's cache to the device."""

    def replay(self, j: int, recording: Any) -> None:
        """Run layer j on a recorded row, once its cache is there."""

    def store_cache(self, j: int, recording: Any) -> Waitable | None:
        """Start to bring what layer j added to a row's cache to where it rests."""

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[P, ...]`` of the last layer, of any rows, to logits ``[P, vocab]``."""


class SerialExecutor:
    """Computes sweeps, one operation after the other."""

    def __init__(
        self,
        rows: Rows,
        *,
        head_slice: int,
        order: Order = "zigzag",
        weights: WeightStore | None = None,
        hidden: HiddenStore | None = None,
    ) -> None:
        """Take over what computes rows and what holds their parts.

        Args:
            rows: The model.
            head_slice: Positions on which the output head works at a time, always: row sizes are numerics.
            order: Of the operations.
            weights: What does not stay on the device; None: everything stays.
            hidden: Where hidden states rest; None: on the device.
        """
        self._rows, self._head_slice, self._order = rows, head_slice, order
        self._weights, self._hidden = weights, hidden
        self._streamed = weights.streamed if weights is not None else frozenset()

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
            try:
                self._run_sweep(_Run(sweep, self._rows, self._hidden), on_logits, on_operation)
            except BaseException:
                if self._weights is not None:
                    self._weights.release_all()
                raise

    def close(self) -> None:
        """Stop what runs beside the computation."""
        for part in (self._weights, self._hidden):
            if part is not None:
                part.close()

    def _run_sweep(
        self, run: _Run, on_logits: LogitsHandler, on_operation: Callable[[Operation], None] | None
    ) -> None:
        num_slots = self._weights.num_slots if self._weights is not None else 0
        loaded = -1
        for operation in sweep_operations(
            self._order, self.num_layers, len(run.recordings), streamed=self._streamed, num_slots=num_slots
        ):
            kind, j, k = operation
            if j == self.num_layers and kind == "release_weights":
                self._finish(run, on_logits)
            if kind in ("load_weights", "release_weights"):
                self._move_weights(operation)
            elif kind == "compute":
                if loaded != j:
                    self._use_weights(j)
                    loaded = j
                run.compute(j, k, last=j == self.num_layers - 1)
            else:
                self._started(run.move(operation))
            if on_operation is not None:
                on_operation(operation)
        if self.num_layers not in self._streamed:
            self._finish(run, on_logits)

    def _move_weights(self, operation: Operation) -> None:
        assert self._weights is not None
        if operation.kind == "load_weights":
            self._weights.begin(operation.j)
            self._weights_started(operation.j)
        else:
            self._weights.release(operation.j)

    def _use_weights(self, j: int) -> None:
        if j in self._streamed:
            assert self._weights is not None
            self._weights.use(j)

    def _weights_started(self, j: int) -> None:
        assert self._weights is not None
        self._weights.finish(j)

    def _started(self, transfer: Waitable | None) -> None:
        if transfer is not None:
            transfer.wait()

    def _finish(self, run: _Run, on_logits: LogitsHandler) -> None:
        self._use_weights(self.num_layers)
        wanted = run.wanted()
        for start in range(0, len(wanted), self._head_slice):
            slice_ = wanted[start : start + self._head_slice]
            on_logits([want for want, _ in slice_], self._logits([token for _, token in slice_]))

    def _logits(self, tokens: list[Tensor]) -> Tensor:
        hidden = torch.stack(tokens)
        padded = hidden.new_zeros(self._head_slice, *hidden.shape[1:])
        padded[: len(tokens)] = hidden
        return self._rows.finish(padded)[: len(tokens)].float()


class OverlappedExecutor(SerialExecutor):
    """Goes on while transfers run: they are waited for where what they bring is needed."""

    def _weights_started(self, j: int) -> None:
        pass

    def _started(self, transfer: Waitable | None) -> None:
        pass


class _Run:
    """A sweep while it is computed."""

    def __init__(self, sweep: Sweep, rows: Rows, hidden: HiddenStore | None) -> None:
        self._rows, self._hidden = rows, hidden
        if hidden is not None:
            hidden.begin_sweep(len(sweep.rows))
        rows.reserve(sweep)
        self._wants = [list(row.wants()) for row in sweep.rows]
        self._final: dict[int, Tensor] = {}
        self.recordings: list[Any] = []
        for k, row in enumerate(sweep.rows):
            self.recordings.append(rows.record(row))
            self._store_hidden(k)

    def move(self, operation: Operation) -> Waitable | None:
        """Start what an operation moves."""
        kind, j, k = operation
        if kind == "load_cache":
            return self._rows.load_cache(j, self.recordings[k])
        if kind == "store_cache":
            transfer = self._rows.store_cache(j, self.recordings[k])
            if k in self._final:
                self.recordings[k] = None
            return transfer
        if kind == "store_hidden":
            return self._store_hidden(k)
        return self._hidden.load(k) if self._hidden is not None else None

    def compute(self, j: int, k: int, *, last: bool) -> None:
        """Run layer j on row k; after the last layer only what the output head needs is kept."""
        recording = self.recordings[k]
        if self._hidden is not None and self._moves(k) and recording.hidden is None:
            recording.hidden = self._hidden.take(k)
        self._rows.replay(j, recording)
        if last:
            offsets = [want.offset for want in self._wants[k]]
            self._final[k] = recording.tokens[torch.tensor(offsets, dtype=torch.long, device=recording.tokens.device)]

    def wanted(self) -> list[tuple[Want, Tensor]]:
        """All wants with the last layer's hidden state ``[...]`` of their positions."""
        return [pair for k, wants in enumerate(self._wants) for pair in zip(wants, self._final[k], strict=True)]

    def _store_hidden(self, k: int) -> Waitable | None:
        if self._hidden is None or not self._moves(k):
            return None
        hidden, self.recordings[k].hidden = self.recordings[k].hidden, None
        return self._hidden.store(k, hidden)

    def _moves(self, k: int) -> bool:
        """Sequences that decode side by side in single rows have small hidden states of their own, which stay."""
        return isinstance(self.recordings[k], Recording)

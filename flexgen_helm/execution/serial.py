"""Executors run a sweep's operations in their order. The serial one is the specification; the overlapped one is the product."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.execution.suspended_calls import RestingCalls
from flexgen_helm.memory.hidden_store import HiddenStore
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.weight_store import WeightStore
from flexgen_helm.model.recorder import Recording
from flexgen_helm.schedule.operations import Operation, Order, head_unit, sweep_operations
from flexgen_helm.schedule.rows import LogitRequest, Row, Sweep, halved

logger = logging.getLogger(__name__)

SMALLEST_ROW = 16
REMEDY = "Lower gpu_batch_tokens or gpu_batch_size, or put a smaller share of weights and cache on the device."

LogitsHandler = Callable[[list[LogitRequest], Tensor], None]
"""Takes the logit requests of a slice of the output head and their logits ``[len(requests), vocab]`` in fp32."""


class Waitable(Protocol):
    """Something that was started."""

    def wait(self) -> None:
        """Wait for its end; raises what went wrong."""


class Rows(Protocol):
    """A model as it computes rows of one kind."""

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through."""

    @property
    def can_be_halved(self) -> bool:
        """Whether a sweep that was given up may be repeated in smaller rows."""

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

    def bad_tokens(self, recording: Any) -> Tensor | None:
        """Tokens ``[T]`` of a row, gone through all layers, whose K or V was not finite; None: that shows in their logits."""

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[P, ...]`` of the last layer, of any rows, to logits ``[P, vocab]``."""

    def close(self) -> None:
        """Give back what the cache holds beside memory."""


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
        meter: Meter | None = None,
    ) -> None:
        """Take over what computes rows and what holds their parts.

        Args:
            rows: The model.
            head_slice: Positions on which the output head works at a time, always: row sizes are numerics.
            order: Of the operations.
            weights: What does not stay on the device; None: everything stays.
            hidden: Where hidden states rest; None: on the device.
            meter: Is told when the device is busy.
        """
        self._meter = meter
        self._rows, self._head_slice, self._order = rows, head_slice, order
        self._weights, self._hidden = weights, hidden
        self._streamed = weights.streamed if weights is not None else frozenset()
        self.num_halvings = 0
        """How often rows were halved because memory did not suffice."""

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through in a sweep."""
        return self._rows.num_layers

    def run(self, sweep: Sweep, on_logits: LogitsHandler, on_operation: Callable[[Operation], None] | None = None) -> None:
        """Compute all rows of a sweep, then the logits that they request.

        Args:
            sweep: What to compute.
            on_logits: Called for each slice of the output head.
            on_operation: Called after each operation; an exception from it ends the sweep.
        """
        with torch.inference_mode():
            while True:
                try:
                    self._run_sweep(_Run(self._cut(sweep), self._rows, self._hidden), on_logits, on_operation)
                    return
                except torch.OutOfMemoryError as error:
                    message = str(error)  # the error itself would keep the sweep's tensors
                except BaseException:
                    self._give_up()
                    raise
                self._give_up()
                self._halve_rows(sweep, message)

    def close(self) -> None:
        """Stop what runs beside the computation."""
        for part in (self._weights, self._hidden, self._rows):
            if part is not None:
                part.close()

    def _cut(self, sweep: Sweep) -> Sweep:
        """The sweep with rows halved as often as memory did not suffice so far."""
        rows = sweep.rows
        for _ in range(self.num_halvings):
            rows = [half for row in rows for half in halved(row)]
        return replace(sweep, rows=rows)

    def _halve_rows(self, sweep: Sweep, message: str) -> None:
        """Go on with smaller rows. Nothing of the sweep was answered yet, and what it stored is stored again."""
        largest = max(row.size for row in sweep.rows) >> self.num_halvings
        if not self._rows.can_be_halved:
            raise OutOfSpace(f"A sequence in a row of its own does not fit into the device's memory ({message}). {REMEDY}")
        self._halved("A row of", largest, message)
        self.num_halvings += 1

    def _halved(self, what: str, size: int, message: str) -> int:
        if size // 2 < SMALLEST_ROW:
            raise OutOfSpace(f"{what} {size} tokens does not fit into the device's memory ({message}). {REMEDY}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning(
            "%s %s tokens does not fit into the device's memory (%s). Continuing with %s: the sweep is repeated and no "
            "answer is lost. Results may differ in the last digits from those of larger rows. %s",
            *(what, size, message, size // 2, REMEDY),
        )
        return size // 2

    def _give_up(self) -> None:
        """Leave everything as it is between sweeps."""
        if self._weights is not None:
            self._weights.release_all()

    def _run_sweep(self, run: _Run, on_logits: LogitsHandler, on_operation: Callable[[Operation], None] | None) -> None:
        num_slots = self._weights.num_slots if self._weights is not None else 0
        for operation in sweep_operations(
            self._order, self.num_layers, run.num_rows, streamed=self._streamed, num_slots=num_slots
        ):
            if operation.kind == "finish":
                self._finish(run, on_logits)
            else:
                self._perform(run, operation)
            if on_operation is not None:
                on_operation(operation)

    def _perform(self, run: _Run, operation: Operation) -> None:
        kind, j, k = operation
        if kind == "record":
            run.record(k)
        elif kind in ("load_weights", "release_weights"):
            self._move_weights(operation)
        elif kind == "compute":
            if run.layer != j:
                self._use_weights(j)
                run.layer = j
            self._compute(run, j, k)
        else:
            self._move(run, operation)

    def _compute(self, run: _Run, j: int, k: int) -> None:
        with self._busy(f"compute {j},{k}"):
            run.compute(j, k, last=j == self.num_layers - 1)

    def _move(self, run: _Run, operation: Operation) -> None:
        transfer = run.move(operation)
        if transfer is not None:
            transfer.wait()

    def _busy(self, name: str) -> AbstractContextManager[None]:
        return self._meter.span("device", name) if self._meter is not None else nullcontext()

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

    def _finish(self, run: _Run, on_logits: LogitsHandler) -> None:
        self._use_weights(head_unit(self.num_layers))
        run.mark()
        requested = run.requested()
        while requested:
            slice_, rest = requested[: self._head_slice], requested[self._head_slice :]
            logits = self._logits([token for _, token in slice_])
            if logits is not None:
                self._answer([request for request, _ in slice_], logits, on_logits)
                requested = rest

    def _answer(self, logit_requests: list[LogitRequest], logits: Tensor, on_logits: LogitsHandler) -> None:
        """Hand logits out. What is answered must not be answered again, so that this is never repeated."""
        try:
            on_logits(logit_requests, logits)
        except torch.OutOfMemoryError as error:
            raise OutOfSpace(
                f"Choosing {len(logit_requests)} tokens does not fit into the device's memory ({error}). {REMEDY}"
            ) from error

    def _logits(self, tokens: list[Tensor]) -> Tensor | None:
        """Logits of a slice; None if memory does not suffice: slices are halved from here on."""
        try:
            hidden = torch.stack(tokens)
            padded = hidden.new_zeros(self._head_slice, *hidden.shape[1:])
            padded[: len(tokens)] = hidden
            with self._busy("head"):
                return self._rows.finish(padded)[: len(tokens)].float()
        except torch.OutOfMemoryError as error:
            message = str(error)
        self._head_slice = self._halved("The output head on", self._head_slice, message)
        return None


class OverlappedExecutor(SerialExecutor):
    """Goes on while transfers run and while the CPU attends: they are waited for where what they bring is needed."""

    def __init__(self, rows: Rows, **options: Any) -> None:
        """See `SerialExecutor`."""
        super().__init__(rows, **options)
        self._resting = RestingCalls()

    def _perform(self, run: _Run, operation: Operation) -> None:
        kind, j, k = operation
        if kind in ("store_cache", "store_hidden") and self._resting.defer(k, partial(super()._perform, run, operation)):
            return
        if kind == "release_weights" or (kind == "compute" and j != run.layer):
            self._resting.end()
        elif kind in ("load_cache", "load_hidden"):
            self._resting.end(k)
        super()._perform(run, operation)

    def _compute(self, run: _Run, j: int, k: int) -> None:
        call = partial(run.compute, j, k, last=j == self.num_layers - 1)
        self._resting.run(k, call, partial(self._busy, f"compute {j},{k}"))

    def _finish(self, run: _Run, on_logits: LogitsHandler) -> None:
        self._resting.end()
        super()._finish(run, on_logits)

    def _give_up(self) -> None:
        self._resting.drop()
        super()._give_up()

    def _weights_started(self, j: int) -> None:
        pass

    def _move(self, run: _Run, operation: Operation) -> None:
        run.move(operation)


class _Run:
    """A sweep while it is computed."""

    def __init__(self, sweep: Sweep, rows: Rows, hidden: HiddenStore | None) -> None:
        self._rows, self._hidden = rows, hidden
        if hidden is not None:
            hidden.begin_sweep(len(sweep.rows))
        rows.reserve(sweep)
        self._sweep = sweep
        self._logit_requests = [list(row.logit_requests()) for row in sweep.rows]
        self._bad: dict[int, Tensor] = {}
        self._final: dict[int, Tensor] = {}
        self.layer = -1
        """Whose weights are in use."""
        self.num_rows = len(sweep.rows)
        self.recordings: list[Any] = []

    def record(self, k: int) -> None:
        """Note how the layers would be called for row k."""
        self.recordings.append(self._rows.record(self._sweep.rows[k]))

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
            offsets = [request.offset for request in self._logit_requests[k]]
            self._final[k] = recording.tokens[torch.tensor(offsets, dtype=torch.long, device=recording.tokens.device)]
            bad = self._rows.bad_tokens(recording)
            if bad is not None:
                self._bad[k] = bad

    def mark(self) -> None:
        """Note whose tokens were not finite, before anything is answered."""
        if self._bad and bool(torch.cat(list(self._bad.values())).any()):
            for k, bad in self._bad.items():
                self._sweep.rows[k].mark(bad.nonzero()[:, 0].tolist())

    def requested(self) -> list[tuple[LogitRequest, Tensor]]:
        """All logit requests with the last layer's hidden state ``[...]`` of their positions."""
        return [
            pair
            for k, logit_requests in enumerate(self._logit_requests)
            for pair in zip(logit_requests, self._final[k], strict=True)
        ]

    def _store_hidden(self, k: int) -> Waitable | None:
        if self._hidden is None or not self._moves(k):
            return None
        hidden, self.recordings[k].hidden = self.recordings[k].hidden, None
        return self._hidden.store(k, hidden)

    def _moves(self, k: int) -> bool:
        """Sequences that decode side by side in single rows have small hidden states of their own, which stay."""
        return isinstance(self.recordings[k], Recording)

"""The executor that performs one operation after the other and waits for each: the specification of every other executor.

It waits for a transfer where it starts it, so nothing is ever on its way while something is computed. Weights are waited for
at `load_weights`, and bound to their module before the first row of a turn. Whoever would suspend a layer call waits instead.

When the device's memory does not suffice, rows are halved and the sweep is repeated as long as nothing was answered; slices of
the output head are halved one by one. They stay small, unless even the smallest did not fit: then the sweep fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Generic, TypeAlias

import torch
from torch import Tensor

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.execution.interfaces import (
    AnyRecording,
    HiddenHandler,
    LayerHandler,
    LogitsHandler,
    Neighbours,
    OperationHandler,
    Rows,
)
from flexgen_helm.execution.sweep_run import SweepRun
from flexgen_helm.memory.hidden_store import HiddenStore
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.out_of_memory import is_out_of_device_memory
from flexgen_helm.memory.spans.span import Activity
from flexgen_helm.memory.weight_store import WeightStore
from flexgen_helm.schedule.operations import Operation, Order, head_unit, sweep_operations
from flexgen_helm.schedule.rows import LogitRequest, Sweep, halved

logger = logging.getLogger(__name__)

HandOut: TypeAlias = Callable[[SweepRun[AnyRecording]], None]
"""Takes what all rows of a sweep have computed."""
SMALLEST_ROW = 16
REMEDY = "Lower gpu_batch_tokens or gpu_batch_size, or put a smaller share of weights and cache on the device."


class SerialExecutor(Generic[AnyRecording]):
    """Computes sweeps, one operation after the other."""

    def __init__(
        self,
        rows: Rows[AnyRecording],
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
            hidden: Where hidden states are stored between two layers; None: on the device.
            meter: Is told when the device is busy.
        """
        self._meter = meter
        self._rows, self._head_slice, self._order = rows, head_slice, order
        self._whole_slice = head_slice
        self._weights, self._hidden = weights, hidden
        self._streamed = weights.streamed if weights is not None else frozenset()
        self._neighbours: Neighbours | None = None
        self.num_halvings = 0
        """How often rows were halved because memory did not suffice."""
        self.free_shapes = False
        """Whether rows and slices of the output head have no padding, so that answers depend on neighbours by a bit."""

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through in a sweep."""
        return self._rows.num_layers

    @property
    def layers(self) -> range:
        """Those that are computed here."""
        return range(self.num_layers) if self._neighbours is None else self._neighbours.layers

    def join(self, neighbours: Neighbours) -> None:
        """Compute a part of the layers from now on, as one stage of a pipeline."""
        self._neighbours = neighbours

    def run(self, sweep: Sweep, on_logits: LogitsHandler, on_operation: OperationHandler | None = None) -> None:
        """Compute all rows of a sweep, then the logits that they request.

        Args:
            sweep: What to compute.
            on_logits: Called for each slice of the output head.
            on_operation: Called after each operation; an exception from it ends the sweep.
        """
        self._run(sweep, lambda run: self._hand_logits_out(run, on_logits), on_operation)

    def run_to_head(self, sweep: Sweep, on_hidden: HiddenHandler, on_layer: LayerHandler | None = None) -> None:
        """Compute all rows of a sweep without the output head, which `logits` applies later.

        Args:
            sweep: What to compute.
            on_hidden: Called once, with everything that the head would be applied to.
            on_layer: Called before each layer is applied to a row, and once behind the last one.
        """
        self._run(sweep, lambda run: on_hidden(run.requested()), None, on_layer)

    @contextmanager
    def unit(self, j: int) -> Iterator[None]:
        """Keep the weights of a unit in use for the body of a `with` statement, between two sweeps.

        Args:
            j: A layer, or the number of layers for the output head.
        """
        self._give_up()  # the slots hold the first units of the next sweep
        try:
            self._use_weights(j)
            yield
        finally:
            self._give_up()

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head, whose unit is in use, in the slices in which a sweep applies it.

        Args:
            hidden: Final hidden states ``[P, ...]`` on the device, of any rows.

        Returns:
            Logits ``[P, vocab]`` in fp32.
        """
        found: list[Tensor] = []
        with torch.inference_mode():
            left = list(hidden)
            while left:
                logits = self._logits(left[: self._head_slice])
                if logits is not None:
                    found.append(logits)
                    left = left[len(logits) :]
            return torch.cat(found)

    def _run(
        self,
        sweep: Sweep,
        hand_out: HandOut[AnyRecording],
        on_operation: OperationHandler | None,
        on_layer: LayerHandler | None = None,
    ) -> None:
        with torch.inference_mode():
            while True:
                try:
                    run = SweepRun(self._cut(sweep), self._rows, self._hidden, on_layer, self._neighbours)
                    self._run_sweep(run, hand_out, on_operation)
                    return
                except BaseException as error:
                    self._give_up()
                    if not is_out_of_device_memory(error):
                        raise
                    message = str(error)  # the error itself would keep the sweep's tensors
                self._halve_rows(sweep, message)

    def close(self) -> None:
        """Stop all transfers and close what is on disk."""
        for part in (self._weights, self._hidden, self._rows):
            if part is not None:
                part.close()

    def _cut(self, sweep: Sweep) -> Sweep:
        """The sweep with rows halved as often as memory did not suffice so far, and without padding if shapes are free."""
        rows = sweep.rows
        for _ in range(self.num_halvings):
            rows = [half for row in rows for half in halved(row)]
        if self.free_shapes:
            rows = [replace(row, size=row.num_tokens) for row in rows]
        return replace(sweep, rows=rows)

    def use_whole_rows(self) -> None:
        """Forget that memory did not suffice for whole rows: the jobs of another run may be shorter."""
        self.num_halvings, self._head_slice = 0, self._whole_slice

    def _halve_rows(self, sweep: Sweep, message: str) -> None:
        """Go on with smaller rows. Nothing of the sweep was answered yet, and what it stored is stored again."""
        largest = max(row.size for row in sweep.rows) >> self.num_halvings
        if self._neighbours is not None:
            raise OutOfSpace(
                f"A row of {largest} tokens does not fit into the memory of a stage's device ({message}). {REMEDY}"
            )
        if not self._rows.can_be_halved:
            raise OutOfSpace(f"A sequence in a row of its own does not fit into the device's memory ({message}). {REMEDY}")
        self._halved("A row of", largest, message)
        self.num_halvings += 1

    def _halved(self, what: str, size: int, message: str) -> int:
        if size // 2 < SMALLEST_ROW:
            self.use_whole_rows()
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

    def _run_sweep(
        self, run: SweepRun[AnyRecording], hand_out: HandOut[AnyRecording], on_operation: OperationHandler | None
    ) -> None:
        num_slots = self._weights.num_slots if self._weights is not None else 0
        for operation in sweep_operations(
            self._order,
            self.num_layers,
            run.num_rows,
            layers=self.layers,
            streamed=self._streamed,
            num_slots=num_slots,
        ):
            if operation.kind == "finish":
                self._finish(run, hand_out)
            else:
                self._perform(run, operation)
            if on_operation is not None:
                on_operation(operation)

    def _perform(self, run: SweepRun[AnyRecording], operation: Operation) -> None:
        kind, j, k = operation
        if kind == "record":
            run.record(k)
        elif kind == "load_weights":
            self._load_weights(j)
        elif kind == "release_weights":
            self._release_weights(j)
            run.layer = -1  # a model of one layer is due again at once, in another slot
        elif kind == "compute":
            if run.layer != j:
                self._use_weights(j)
                run.layer = j
            self._compute(run, j, k)
        else:
            self._move(run, operation)

    def _compute(self, run: SweepRun[AnyRecording], j: int, k: int) -> None:
        with self._busy(Activity("compute", f"{j},{k}")):
            run.compute(j, k)

    def _move(self, run: SweepRun[AnyRecording], operation: Operation) -> None:
        transfer = run.move(operation)
        if transfer is not None:
            transfer.wait()

    def _busy(self, activity: Activity) -> AbstractContextManager[None]:
        return self._meter.span("device", activity) if self._meter is not None else nullcontext()

    def _load_weights(self, j: int) -> None:
        assert self._weights is not None
        self._weights.begin(j)
        self._weights.finish(j)

    def _release_weights(self, j: int) -> None:
        assert self._weights is not None
        self._weights.release(j)

    def _use_weights(self, j: int) -> None:
        if j in self._streamed:
            assert self._weights is not None
            self._weights.use(j)

    def _finish(self, run: SweepRun[AnyRecording], hand_out: HandOut[AnyRecording]) -> None:
        run.mark()
        hand_out(run)

    def _hand_logits_out(self, run: SweepRun[AnyRecording], on_logits: LogitsHandler) -> None:
        self._use_weights(head_unit(self.num_layers))
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
        except RuntimeError as error:
            if not is_out_of_device_memory(error):
                raise
            raise OutOfSpace(
                f"Choosing {len(logit_requests)} tokens does not fit into the device's memory ({error}). {REMEDY}"
            ) from error

    def _logits(self, tokens: list[Tensor]) -> Tensor | None:
        """Logits of a slice; None if memory does not suffice: slices are halved from here on."""
        try:
            hidden = torch.stack(tokens)
            size = len(tokens) if self.free_shapes else self._head_slice
            padded = hidden.new_zeros(size, *hidden.shape[1:])
            padded[: len(tokens)] = hidden
            with self._busy(Activity("finish")):
                return self._rows.finish(padded)[: len(tokens)].float()
        except RuntimeError as error:
            if not is_out_of_device_memory(error):
                raise
            message = str(error)
        self._head_slice = self._halved("The output head on", self._head_slice, message)
        return None

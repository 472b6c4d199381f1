"""One sweep while it is computed: its recorded rows, and what is left of them for the output head.

Nothing here waits, except that a row's layer call waits for the row's own hidden state. When transfers are waited for
beyond that is up to the executor.
"""

from __future__ import annotations

from typing import Generic

import torch
from torch import Tensor

from flexgen_helm.execution.interfaces import AnyRecording, LayerHandler, Neighbours, Rows
from flexgen_helm.memory.copies import upload
from flexgen_helm.memory.hidden_store import HiddenStore
from flexgen_helm.memory.link import Transfer
from flexgen_helm.schedule.operations import Operation
from flexgen_helm.schedule.rows import LogitRequest, Sweep


class SweepRun(Generic[AnyRecording]):
    """Performs the operations of one sweep that are about a row."""

    def __init__(
        self,
        sweep: Sweep,
        rows: Rows[AnyRecording],
        hidden: HiddenStore | None,
        on_layer: LayerHandler | None = None,
        neighbours: Neighbours | None = None,
    ) -> None:
        """Make room for a sweep.

        Args:
            sweep: What is computed.
            rows: The model.
            hidden: Where hidden states are stored between two layers; None: on the device.
            on_layer: Called before each layer is applied to a row, and once behind the last one.
            neighbours: The other stages of a pipeline; None: all layers are computed here.
        """
        self._rows, self._hidden, self._on_layer, self._neighbours = rows, hidden, on_layer, neighbours
        self._layers = range(rows.num_layers) if neighbours is None else neighbours.layers
        if hidden is not None:
            hidden.begin_sweep(len(sweep.rows))
        rows.reserve(sweep)
        self._sweep = sweep
        self._logit_requests = [list(row.logit_requests()) for row in sweep.rows]
        self._recordings: dict[int, AnyRecording] = {}
        self._bad: dict[int, Tensor] = {}
        self._final: dict[int, Tensor] = {}
        self._through: set[int] = set()
        """Rows that went through all layers."""
        self.layer = -1
        """The layer whose weights are in use; -1: none."""

    @property
    def num_rows(self) -> int:
        """Rows of the sweep."""
        return len(self._sweep.rows)

    def record(self, k: int) -> None:
        """Note how the layers would be called for row k."""
        self._recordings[k] = self._rows.record(self._sweep.rows[k])

    def move(self, operation: Operation) -> Transfer | None:
        """Start what an operation moves; None: it is there already."""
        kind, j, k = operation
        if kind == "load_cache":
            return self._rows.load_cache(j, self._recordings[k])
        if kind == "store_cache":
            transfer = self._rows.store_cache(j, self._recordings[k])
            if k in self._through:
                del self._recordings[k]
            return transfer
        if kind == "store_hidden":
            return None if self._comes(j + 1) else self._store_hidden(k)
        assert kind == "load_hidden"
        return None if self._hidden is None or self._comes(j) else self._hidden.load(k)

    def compute(self, j: int, k: int) -> None:
        """Run layer j on row k; after the last layer the row goes to the next stage, or what the output head needs is kept."""
        recording = self._recordings[k]
        if self._comes(j):
            self._receive(k)
        elif self._hidden is not None and recording.hidden_moves and recording.hidden is None:
            recording.hidden = self._hidden.take(k)
        self._show(j, k)
        self._rows.replay(j, recording)
        if j == self._layers[-1]:
            self._show(j + 1, k)
            self._end(k)

    def _comes(self, j: int) -> bool:
        """Whether the hidden states for layer j come from another stage."""
        return j == self._layers.start > 0

    def _receive(self, k: int) -> None:
        assert self._neighbours is not None
        recording = self._recordings[k]
        recording.hidden, bad = self._neighbours.receive(k)
        own = self._rows.bad_tokens(recording)
        assert own is not None
        own |= bad

    def _end(self, k: int) -> None:
        """Take a row that went through all layers of this executor."""
        self._through.add(k)
        recording = self._recordings[k]
        bad = self._rows.bad_tokens(recording)
        if self._neighbours is not None and self._layers.stop < self._rows.num_layers:
            assert bad is not None
            assert recording.hidden is not None
            self._neighbours.send(k, recording.hidden, bad)
            recording.hidden = None
            return
        offsets = [request.offset for request in self._logit_requests[k]]
        self._final[k] = recording.tokens[upload(offsets, recording.tokens.device)]
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

    def _show(self, j: int, k: int) -> None:
        if self._on_layer is not None:
            self._on_layer(j, self._sweep.rows[k], self._recordings[k])

    def _store_hidden(self, k: int) -> Transfer | None:
        recording = self._recordings[k]
        if self._hidden is None or not recording.hidden_moves:
            return None
        hidden, recording.hidden = recording.hidden, None
        assert hidden is not None
        return self._hidden.store(k, hidden)

"""Rows between two stages: a row's hidden state travels while the next row is computed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_helm.distributed.channel import Delivery
from flexgen_helm.distributed.group import StageGroup
from flexgen_helm.distributed.row_links import RowLink
from flexgen_helm.errors import FlexGenError, UnsupportedModel
from flexgen_helm.policy.stages.row_travel import row_bytes
from flexgen_helm.schedule.rows import Row


class NotComputed(FlexGenError):
    """A row that an earlier stage could not compute; that stage tells why."""


@dataclass(frozen=True)
class RowForm:
    """The form of hidden states between two layers: ``[1, T, hidden_size]``."""

    hidden_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of the hidden state of a token."""
        return self.hidden_size * self.dtype.itemsize

    def num_bytes(self, tokens: int) -> int:
        """Bytes of a row of so many tokens with what goes with it."""
        return row_bytes(self.token_bytes, tokens)

    def pack(self, hidden: Tensor, bad: Tensor, where: torch.device) -> Tensor:
        """Return a row as bytes.

        Raises:
            UnsupportedModel: If the model's hidden states have another form.
        """
        tokens = len(bad)
        if hidden.shape != (1, tokens, self.hidden_size) or hidden.dtype != self.dtype:
            raise UnsupportedModel(
                f"its hidden states are {list(hidden.shape)} in {hidden.dtype}, and stages exchange "
                f"{[1, tokens, self.hidden_size]} in {self.dtype}. Run it in one process."
            )
        content = hidden.contiguous().view(-1).view(torch.uint8)
        failed = torch.zeros(1, dtype=torch.uint8, device=hidden.device)
        return torch.cat([content, bad.to(torch.uint8), failed]).to(where)

    def failed(self, tokens: int, where: torch.device) -> Tensor:
        """Return the bytes of a row that could not be computed."""
        row = torch.zeros(self.num_bytes(tokens), dtype=torch.uint8, device=where)
        row[-1] = 1
        return row

    def unpack(self, row: Tensor, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return hidden state ``[1, tokens, hidden_size]`` and bad tokens ``[tokens]`` of a row's bytes.

        Raises:
            NotComputed: If an earlier stage could not compute it.
        """
        if row[-1]:
            raise NotComputed("an earlier stage could not compute this row")
        row = row.to(device)
        end = tokens * self.token_bytes
        hidden = row[:end].view(self.dtype).view(1, tokens, self.hidden_size)
        return hidden, row[end : end + tokens].bool()


class StageNeighbours:
    """The stages before and behind this one. It is a `flexgen_helm.execution.interfaces.Neighbours`."""

    def __init__(self, layers: range, form: RowForm, link: RowLink, *, stages: StageGroup, device: torch.device) -> None:
        """Take and send nothing yet.

        Args:
            layers: Layers of this stage.
            form: Form of hidden states.
            link: What connects the stages.
            stages: The stages.
            device: Device that computes.
        """
        self._layers, self._form, self._link, self._stages, self._device = layers, form, link, stages, device
        self._left: deque[tuple[int, list[Delivery]]] = deque()
        self._sizes: list[int] = []
        self._ready: dict[int, Tensor] = {}
        """Rows that wait for earlier ones, for which the CPU still attends."""
        self._number = self._sent = self._taken = 0
        self.waited_seconds = 0.0
        """Seconds in which this stage waited for rows."""

    @property
    def layers(self) -> range:
        """Layers of this stage."""
        return self._layers

    def expect(self, rows: Sequence[Row]) -> None:
        """Hear of the rows of a sweep, in any thread; sweeps are expected in their order."""
        if not self._stages.is_first:
            self._link.expect([self._form.num_bytes(row.size) for row in rows])

    def begin_sweep(self, number: int, rows: Sequence[Row], *, delivered: int) -> None:
        """Begin to compute a sweep.

        Args:
            number: Its number.
            rows: Its rows.
            delivered: Number of the last sweep of which the stage behind has all rows; -1: none.
        """
        self._sizes, self._number, self._sent, self._taken = [row.size for row in rows], number, 0, 0
        self._ready.clear()
        while self._left and self._left[0][0] <= delivered:
            self._stages.wait_for(self._left.popleft()[1])

    def receive(self, k: int) -> tuple[Tensor, Tensor]:
        """See `Neighbours`. Rows come in their order."""
        assert k == self._taken, "rows are received in their order"
        self._taken += 1
        begun = time.perf_counter()
        row = self._link.receive()
        self.waited_seconds += time.perf_counter() - begun
        return self._form.unpack(row, self._sizes[k], self._device)

    def send(self, k: int, hidden: Tensor, bad: Tensor) -> None:
        """See `Neighbours`. Rows leave in their order."""
        self._ready[k] = self._form.pack(hidden, bad, self._link.where)
        while self._sent in self._ready:
            self._send(self._ready.pop(self._sent))

    def give_up(self, *, sends: bool) -> None:
        """Take the rest of the sweep's rows and throw it away, and tell the stage behind that the rest does not come.

        Args:
            sends: Whether there is a stage behind.
        """
        while not self._stages.is_first and self._taken < len(self._sizes):
            self._taken += 1
            self._link.receive()
        while sends and self._sent < len(self._sizes):
            self._send(self._form.failed(self._sizes[self._sent], self._link.where))

    def close(self) -> None:
        """Part from the other stages, once all sweeps are computed."""
        self._link.close()

    def _send(self, row: Tensor) -> None:
        self._left.append((self._number, self._link.send(row)))
        self._sent += 1

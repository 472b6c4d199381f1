"""Interfaces of an executor: the rows that it computes, their recordings, and those who hear of operations and logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import Tensor

from flexgen_helm.memory.link import Transfer
from flexgen_helm.schedule.operations import Operation
from flexgen_helm.schedule.rows import LogitRequest, Row, Sweep


class Recording(Protocol):
    """A row of which is known how its layers are called, between two of these calls."""

    hidden: Tensor | None
    """Its hidden state; None while it is stored elsewhere."""

    @property
    def hidden_moves(self) -> bool:
        """Whether the hidden state may be stored on another tier between two layers."""

    @property
    def tokens(self) -> Tensor:
        """The hidden state with tokens in front: ``[T, ...]``."""


class Neighbours(Protocol):
    """The stages before and behind a stage of a pipeline, which give and take rows between two layers, in their order."""

    @property
    def layers(self) -> range:
        """Layers that this stage computes."""

    def receive(self, k: int) -> tuple[Tensor, Tensor]:
        """Wait for row k from the stage before, and return its hidden state ``[1, T, hidden]`` and its bad tokens ``[T]``.

        Raises:
            FlexGenError: If a stage before could not compute it.
        """

    def send(self, k: int, hidden: Tensor, bad: Tensor) -> None:
        """Start to send row k to the stage behind."""


LogitsHandler = Callable[[list[LogitRequest], Tensor], None]
"""Takes the logit requests of a slice of the output head and their logits ``[len(requests), vocab]`` in fp32."""
HiddenHandler = Callable[[list[tuple[LogitRequest, Tensor]]], None]
"""Takes all logit requests of a sweep, each with the last layer's hidden state ``[...]`` of its position."""
LayerHandler = Callable[[int, Row, Recording], None]
"""Is shown a row before layer j is applied to it, and behind the last layer too; it may change the hidden state."""
OperationHandler = Callable[[Operation], None]
"""Is told of each operation that was performed; an exception from it ends the sweep."""


AnyRecording = TypeVar("AnyRecording", bound=Recording)


class Rows(Protocol[AnyRecording]):
    """A model that computes rows of one kind, each of which it records in a form of its own."""

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through."""

    @property
    def can_be_halved(self) -> bool:
        """Whether a sweep that was given up may be repeated in smaller rows."""

    def reserve(self, sweep: Sweep) -> None:
        """Make room for what a sweep stores."""

    def record(self, row: Row) -> AnyRecording:
        """Note how the layers would be called for a row."""

    def load_cache(self, j: int, recording: AnyRecording) -> Transfer | None:
        """Start to bring what layer j needs of a row's cache to the device."""

    def replay(self, j: int, recording: AnyRecording) -> None:
        """Run layer j on a recorded row, once its cache is there."""

    def store_cache(self, j: int, recording: AnyRecording) -> Transfer | None:
        """Start to bring what layer j added to a row's cache to where it is stored."""

    def use_suspender(self, suspend: Callable[[], None]) -> None:
        """Take what a layer call may use while it waits for the CPU: `suspend` returns when the call must go on.

        Without one, a call just waits.
        """

    def bad_tokens(self, recording: AnyRecording) -> Tensor | None:
        """Tokens ``[T]`` of a row, gone through all layers, whose K or V was not finite; None: that shows in their logits."""

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[P, ...]`` of the last layer, of any rows, to logits ``[P, vocab]``."""

    def close(self) -> None:
        """Stop threads of the cache and remove its files."""


class Executor(Protocol):
    """Computes sweeps, one at a time."""

    @property
    def num_layers(self) -> int:
        """Layers that every row goes through in a sweep."""

    @property
    def layers(self) -> range:
        """Those that this executor computes: all, or the ones of a stage of a pipeline."""

    def run(self, sweep: Sweep, on_logits: LogitsHandler, on_operation: OperationHandler | None = None) -> None:
        """Compute all rows of a sweep, then the logits that they request."""

    def run_to_head(self, sweep: Sweep, on_hidden: HiddenHandler, on_layer: LayerHandler | None = None) -> None:
        """Compute all rows of a sweep, but no logits."""

    def unit(self, j: int) -> AbstractContextManager[None]:
        """Keep the weights of layer j, or of the output head behind the last one, in use for the body of a `with` statement."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states ``[P, ...]`` to logits ``[P, vocab]`` in fp32, while the output head's unit is in use."""

    def use_whole_rows(self) -> None:
        """Forget that memory did not suffice for whole rows: the jobs of another run may be shorter."""

    def close(self) -> None:
        """Stop all transfers and close what is on disk."""

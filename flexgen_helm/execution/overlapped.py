"""The executor that goes on while transfers run and while the CPU attends: it waits where a result is needed, and only there.

Operations come in the order of `schedule/operations.py`, and one thread performs them.

* What moves is only started: weights by `WeightStore.begin`, hidden states by `HiddenStore`, K and V by `Rows`. Each of the
  three has a thread that moves one thing after the other, so a load finds what an earlier store of the same thing left.
  On a GPU a transfer begins once the device has done all that it was given before.
* A layer's weights are waited for before its first row of a turn, those of the output head before `finish`.
* A row's hidden state is waited for when its layer is called (`SweepRun.compute`), its K and V when the layer attends.
* A layer call whose attention the CPU does is suspended, so that the device computes the next row meanwhile.
  It ends when another call is suspended behind it, when the same row is needed again, before weights are released or
  exchanged, and before `finish`. What a suspended row stores is started when its call has ended.
* Nothing waits for a store; one that went wrong is heard of when its content is loaded, or at the next sweep.

`schedule/dependencies.py` states the same as data, and `tests/execution/test_overlapped.py` compares the two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from flexgen_helm.execution.interfaces import AnyRecording, Rows
from flexgen_helm.execution.serial import HandOut, SerialExecutor
from flexgen_helm.execution.suspended_calls import SuspendedCalls
from flexgen_helm.execution.sweep_run import SweepRun
from flexgen_helm.memory.spans.span import Activity
from flexgen_helm.schedule.operations import Operation


class OverlappedExecutor(SerialExecutor[AnyRecording]):
    """Computes sweeps while what the next rows and layers need is on its way."""

    def __init__(self, rows: Rows[AnyRecording], **options: Any) -> None:
        """See `SerialExecutor`."""
        super().__init__(rows, **options)
        self._suspended = SuspendedCalls()
        rows.use_suspender(self._suspended.suspend)

    def _perform(self, run: SweepRun[AnyRecording], operation: Operation) -> None:
        kind, j, k = operation
        if kind in ("store_cache", "store_hidden") and self._suspended.defer(k, partial(super()._perform, run, operation)):
            return
        if kind == "release_weights" or (kind == "compute" and j != run.layer):
            self._suspended.end()
        elif kind in ("load_cache", "load_hidden"):
            self._suspended.end(k)
        super()._perform(run, operation)

    def _compute(self, run: SweepRun[AnyRecording], j: int, k: int) -> None:
        call = partial(run.compute, j, k)
        self._suspended.run(k, call, partial(self._busy, Activity("compute", f"{j},{k}")))

    def _finish(self, run: SweepRun[AnyRecording], hand_out: HandOut[AnyRecording]) -> None:
        self._suspended.end()
        super()._finish(run, hand_out)

    def _give_up(self) -> None:
        self._suspended.drop()
        super()._give_up()

    def _load_weights(self, j: int) -> None:
        assert self._weights is not None
        self._weights.begin(j)

    def _move(self, run: SweepRun[AnyRecording], operation: Operation) -> None:
        run.move(operation)

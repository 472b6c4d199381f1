"""Attention on the CPU beside a device with a memory of its own: it runs while the device computes (FlexGen section 4.3)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from flexgen_helm.attention.kernels import Merged
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity


def _just_wait() -> None:
    """Leave the call that waits as it is."""


class HostAttention:
    """A thread that attends for rows."""

    def __init__(self, meter: Meter) -> None:
        """Nothing runs before the first call."""
        self._meter = meter
        self.suspend: Callable[[], None] = _just_wait
        """Called by a layer call that waits for the thread, so that something else may be computed."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flexgen-helm-attention")

    def attend(self, activity: Activity, num_bytes: int, work: Callable[[], Merged]) -> Merged:
        """Attend in the thread. Meanwhile the layer call is suspended.

        Args:
            activity: What the meter is told.
            num_bytes: Bytes of the pages that are read.
            work: Attends.
        """

        def timed() -> Merged:
            with torch.inference_mode(), self._meter.span("cpu_attention", activity, num_bytes):
                return work()

        future: Future[Merged] = self._pool.submit(timed)
        if not future.done():
            self.suspend()
        with self._meter.waiting():
            return future.result()

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()

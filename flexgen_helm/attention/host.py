"""Attention on the CPU beside a device with a memory of its own: it runs while the device computes (FlexGen section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from flexgen_helm.attention.kernels import Merged
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity

FP32 = 4
"""Bytes of a float32."""


def row_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Return the bytes on the host of a row that attends there, pages left out.

    Args:
        q: Queries ``[T, H, D]``, on the host as K and V are; the outputs come beside them.
        k: ``[T, H_kv, D]``.
        v: ``[T, H_kv, Dv]``.
    """
    value_dim = v.shape[2]
    in_fp32 = q.shape[2] + value_dim + 2  # a query, the weighted sum of the values, the largest score, the sum of weights
    return q.nbytes + k.nbytes + v.nbytes + q.shape[0] * q.shape[1] * (value_dim * v.itemsize + in_fp32 * FP32)


def _just_wait() -> None:
    """Leave the call that waits as it is."""


class HostAttention:
    """A thread that attends for rows."""

    def __init__(self, meter: Meter) -> None:
        """Nothing runs before the first call."""
        self._meter = meter
        self.suspend: Callable[[], None] = _just_wait
        """Called by a layer call that waits for the thread, so that something else may be computed."""
        self._held = 0
        """Bytes of rows that attend or are suspended."""
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

    @contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """Count the bytes that a row has on the host, pages left out, during the body of a `with` statement."""
        self._count(num_bytes)
        try:
            yield
        finally:
            self._count(-num_bytes)

    def _count(self, num_bytes: int) -> None:
        self._held += num_bytes
        self._meter.hold("host", "attention", self._held)

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()

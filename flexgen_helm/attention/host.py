"""Attention on the CPU for chunks that are stored on the host, while the device computes (FlexGen section 4.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from flexgen_helm.attention.calls import ChunkCall
from flexgen_helm.attention.chunks import Kernel, LocatedPages
from flexgen_helm.attention.kernels import ChunkOutput
from flexgen_helm.kv_cache.page_format import PageTensors
from flexgen_helm.memory.meter import Activity, Meter


def _just_wait() -> None:
    """Leave the call that waits as it is."""


class HostAttention:
    """A thread whose kernels use all cores."""

    def __init__(self, meter: Meter) -> None:
        """Nothing runs before the first call."""
        self._meter = meter
        self.suspend: Callable[[], None] = _just_wait
        """Called by a layer call that waits for the thread, so that something else may be computed."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flexgen-helm-attention")

    def begin(
        self, activity: Activity, calls: Sequence[ChunkCall], queries: Tensor, store: PageTensors, kernel: Kernel
    ) -> list[Future[ChunkOutput]]:
        """Start some calls on the CPU.

        Args:
            activity: What the meter is told.
            calls: Calls whose pages are all on the host.
            queries: The row's queries ``[T, H, D]``, in host memory.
            store: The layer's pages on the host.
            kernel: Computes a call.

        Returns:
            The future of each call's output.
        """

        def attend(call: ChunkCall) -> ChunkOutput:
            pages = LocatedPages(store, call.pages[0].numbers, None)
            num_bytes = len(pages.numbers) * store.format.num_bytes
            with torch.inference_mode(), self._meter.span("cpu_attention", activity, num_bytes):
                return kernel(call, queries, [pages])

        return [self._pool.submit(attend, call) for call in calls]

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()

"""Default row sizes, by device and threads only. No torch."""

from __future__ import annotations

VECTOR = 16
"""Floats in a vector register (AVX-512). Elementwise kernels give other bits in the scalar tail of each thread's share."""
GPU_ROWS = (256, 4096)
"""(gpu_batch_size, gpu_batch_tokens) on a GPU."""
CPU_ROWS = (64, 512)
"""(gpu_batch_size, gpu_batch_tokens) on a CPU, for throughput."""
SMALL_CPU_ROWS = (16, 64)
"""(gpu_batch_size, gpu_batch_tokens) on a CPU for a few requests at a time: padding would cost more than large rows gain."""


def default_rows(*, is_gpu: bool, threads: int, few_requests: bool = False) -> tuple[int, int]:
    """Return (gpu_batch_size, gpu_batch_tokens).

    Args:
        is_gpu: Whether the device is a GPU.
        threads: Threads that compute on a CPU.
        few_requests: Whether requests come a few at a time, as in HELM's client.
    """
    if is_gpu:
        return GPU_ROWS
    step = VECTOR * threads
    size, tokens = SMALL_CPU_ROWS if few_requests else CPU_ROWS
    return -(-size // step) * step, -(-tokens // step) * step

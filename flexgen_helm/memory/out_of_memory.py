"""The one place that knows how a device says that its memory does not suffice."""

from __future__ import annotations

import torch

TEXTS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory")
"""Parts of the messages of errors without a type of their own: memory ended outside of torch's allocator, while CUDA loaded a
kernel (`torch.AcceleratorError`), or in cuBLAS or Triton (`RuntimeError`)."""


def is_out_of_device_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the device that computes does not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)

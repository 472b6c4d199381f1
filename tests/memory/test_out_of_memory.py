"""Errors that mean that a GPU's memory does not suffice, in the words of torch, cuBLAS and Triton, and others."""

from __future__ import annotations

import pytest
import torch

from flexgen_helm.memory.out_of_memory import is_out_of_device_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ..."), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), False),
        (ValueError("CUDA error: out of memory"), False),
        (MemoryError("of the host"), False),
    ],
    ids=str,
)
def test_errors_of_memory_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_out_of_device_memory(error) == expected

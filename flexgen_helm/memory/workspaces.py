"""Workspaces of the libraries that multiply matrices on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import linear

from flexgen_helm.memory.device import Device


def make_workspaces(device: Device, dtype: torch.dtype) -> None:
    """Let cuBLAS take the memory with which a thread multiplies, so that a plan made afterwards does not count it as free.

    torch has a handle of cuBLAS, with its workspace, for each thread that multiplies. When a thread has ended, the next one
    gets its handle: here that is the worker of an engine.

    Args:
        device: The device that computes. Nothing is done on a CPU.
        dtype: Dtype of the products.
    """
    if device.is_gpu:
        with ThreadPoolExecutor(1, thread_name_prefix="flexgen-helm-workspaces") as pool:
            pool.submit(_multiply, device.torch_device, dtype).result()


def _multiply(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.zeros(16, 16, device=device, dtype=dtype)
    linear(x, x, x[0])
    torch.matmul(x, x)
    torch.cuda.synchronize(device)

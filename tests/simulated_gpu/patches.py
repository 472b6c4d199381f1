"""``torch.cuda`` of the simulated GPU, for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flexgen_helm.attention.paged import trial
from flexgen_helm.compression.fused import unpack
from tests.simulated_gpu.allocator import GIB
from tests.simulated_gpu.gpu import SimulatedGpu
from tests.simulated_gpu.kernels import touch
from tests.simulated_gpu.streams import Event, Stream, bound, use_stream
from tests.simulated_gpu.threads import on_gpu, threads_patched

NAME = "simulated GPU"


@contextmanager
def simulated_gpu(total: int = 80 * GIB, *, shapes_only: bool = False) -> Iterator[SimulatedGpu]:
    """Let torch see one CUDA device; behind the context everything is as before.

    Engines must be closed inside of it. Two things stay, which nobody without a GPU sees: torch believes that CUDA was
    initialised, and has a device guard for it that does nothing.

    Args:
        total: Bytes of the device's memory.
        shapes_only: See `SimulatedGpu`.
    """
    gpu = SimulatedGpu(total, shapes_only=shapes_only)
    torch._C._ensureCUDADeviceGuardSet()
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter cannot change its class in place
        for name, value in (_device(gpu) | _memory(gpu) | _streams(gpu)).items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(Tensor, "numpy", _numpy(gpu, Tensor.numpy)))
        stack.enter_context(patch.object(trial, "paged_kernel", lambda *_: None))  # Triton sees no GPU
        stack.enter_context(patch.object(unpack, "serves", lambda *_: False))
        stack.enter_context(threads_patched(gpu))
        stack.enter_context(on_gpu(gpu))
        yield gpu


def _device(gpu: SimulatedGpu) -> dict[str, Any]:
    properties = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=gpu.allocator.total, multi_processor_count=132)
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "cudart": lambda: SimpleNamespace(
            cudaHostRegister=lambda address, num_bytes, flags: gpu.pin(address, num_bytes), cudaHostUnregister=gpu.unpin
        ),
    }


def _memory(gpu: SimulatedGpu) -> dict[str, Any]:
    allocator = gpu.allocator

    def settled(read: Callable[[], Any]) -> Callable[..., Any]:
        def method(device: Any = None) -> Any:
            gpu.settle()
            return read()

        return method

    def set_fraction(fraction: float, device: Any = None) -> None:
        allocator.allowed = int(fraction * allocator.total)

    return {
        "memory_allocated": settled(lambda: allocator.allocated),
        "max_memory_allocated": settled(lambda: allocator.most_allocated),
        "memory_reserved": settled(lambda: allocator.reserved),
        "max_memory_reserved": settled(lambda: allocator.most_reserved),
        "reset_peak_memory_stats": settled(allocator.reset_peaks),
        "empty_cache": settled(allocator.empty_cache),
        "mem_get_info": settled(lambda: (allocator.total - allocator.reserved, allocator.total)),
        "get_per_process_memory_fraction": lambda device=None: allocator.allowed / allocator.total,
        "set_per_process_memory_fraction": set_fraction,
    }


def _streams(gpu: SimulatedGpu) -> dict[str, Any]:
    stream = bound(Stream, gpu)

    def synchronize(device: Any = None) -> None:
        for agent in gpu.streams:
            gpu.wait(agent.known, "cuda.synchronize")

    return {
        "Stream": stream,
        "Event": bound(Event, gpu),
        "stream": partial(use_stream, gpu),
        "current_stream": lambda device=None: stream(agent=gpu.stream),
        "default_stream": lambda device=None: stream(agent=gpu.default_stream),
        "synchronize": synchronize,
    }


def _numpy(gpu: SimulatedGpu, real: Callable[..., Any]) -> Callable[..., Any]:
    """Memory that is seen as an array may be written, by a read of a file for instance."""

    def method(x: Tensor, **options: Any) -> Any:
        touch(gpu, "numpy", x, writes=True)
        return real(x, **options)

    return method

"""Copies between host and device, and pinned host memory."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from tests.simulated_gpu import kernels, shapes
from tests.simulated_gpu.gpu import SimulatedGpu, Size
from tests.simulated_gpu.tensors import GpuTensor, content_of, extent, new_on_gpu, start

aten = torch.ops.aten


def copy_(gpu: SimulatedGpu, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``target.copy_(source)`` between any devices."""
    func = aten.copy_.default
    if isinstance(target, GpuTensor) == isinstance(source, GpuTensor):
        side = kernels.on_device if isinstance(target, GpuTensor) else kernels.on_host
        side(gpu, func, (target, source), {})
        return target
    shapes.computed(gpu, func, (content_of(target), shapes.filled(content_of(source))), {})
    travel(gpu, target, source, non_blocking=non_blocking)
    return target


def to_copy(gpu: SimulatedGpu, source: Tensor, **kwargs: Any) -> Any:
    """``source.to(...)`` that makes a new tensor."""
    func, device = aten._to_copy.default, torch.device(kwargs.pop("device", None) or source.device)
    non_blocking = kwargs.pop("non_blocking", False)
    kwargs.pop("pin_memory", None)
    if device.type == source.device.type and device.type != "meta":
        side = kernels.on_device if isinstance(source, GpuTensor) else kernels.on_host
        return side(gpu, func, (source,), kwargs)
    if device.type == "meta" or source.device.type == "meta":
        return func(
            content_of(source), device="cpu" if device.type == "cuda" else device, **kwargs
        )  # as torch does, or refuses
    made = func(shapes.filled(content_of(source)), **kwargs)
    target = new_on_gpu(gpu, shapes.hollow(gpu, made)) if device.type == "cuda" else made
    if device.type == "cpu" and non_blocking:
        target = new_pinned(gpu, made)
    travel(gpu, target, source, non_blocking=non_blocking)
    return target


def travel(gpu: SimulatedGpu, target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
    """Append a copy between host and device to the current stream. Only pinned memory is copied while the host goes on."""
    host, device = (source, target) if isinstance(target, GpuTensor) else (target, source)
    assert isinstance(device, GpuTensor)
    pinned = gpu.pinned_at(host.data_ptr()) if host.numel() else None
    on_device = (device.memory, extent(device.content, start(device)))
    on_host = [] if pinned is None else [(pinned, extent(host, host.data_ptr() - pinned.begin))]
    up = device is target
    what = f"{'h2d' if up else 'd2h'} {'pageable' if pinned is None else 'pinned'}"
    stream = gpu.run("copy", what, on_host if up else [on_device], [on_device] if up else on_host, size=Size(host.nbytes))
    if host.numel() and (pinned is None or not non_blocking):
        gpu.finish(stream, what, [device.memory])


def new_pinned(gpu: SimulatedGpu, like: Tensor) -> Tensor:
    """A copy of a tensor in pinned memory of torch's own, which is not reused before its copies have ended."""
    storage_bytes = like.untyped_storage().nbytes()
    owner = (ctypes.c_ubyte * max(1, storage_bytes))()
    address = ctypes.addressof(owner)
    gpu.pin(address, storage_bytes)
    weakref.finalize(owner, gpu.unpin, address, watched=True)
    memory = torch.frombuffer(owner, dtype=torch.uint8)[:storage_bytes].view(like.dtype)
    return memory.as_strided(like.size(), like.stride()).copy_(like)


def pin_memory(gpu: SimulatedGpu, x: Tensor, device: Any = None) -> Tensor:
    """``x.pin_memory()``."""
    return new_pinned(gpu, x)


def is_pinned(gpu: SimulatedGpu, x: Tensor, device: Any = None) -> bool:
    """``x.is_pinned()``."""
    return not isinstance(x, GpuTensor) and gpu.pinned_at(x.data_ptr()) is not None

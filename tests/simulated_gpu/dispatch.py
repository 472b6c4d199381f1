"""All operators of a thread: which of them run on the GPU, on the host, or between both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulated_gpu import copies, shapes
from tests.simulated_gpu.gpu import SimulatedGpu
from tests.simulated_gpu.kernels import aten, check_devices, launch, on_device, on_host, traits
from tests.simulated_gpu.tensors import GpuTensor, content_of, mapped, tensors_in


class GpuMode(TorchDispatchMode):
    """Sees every operator of a thread."""

    def __init__(self, gpu: SimulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(self.gpu, func, args, kwargs or {})


def dispatch(gpu: SimulatedGpu, func: Any, args: Any, kwargs: Any) -> Any:
    """Run any operator, of which operands or the result may be on the GPU."""
    special = SPECIAL.get(func)
    if special is not None:
        return special(gpu, *args, **kwargs)
    tensors = tensors_in(args, kwargs)
    on_gpu = any(isinstance(x, GpuTensor) for x in tensors)
    to_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
    if kwargs.get("pin_memory"):
        return copies.new_pinned(gpu, func(*args, **(kwargs | {"pin_memory": False})))
    if not on_gpu and not to_gpu:
        return on_host(gpu, func, args, kwargs)
    if traits(func).is_composite and (tensors or not to_gpu):
        with GpuMode(gpu):
            return func.decompose(*args, **kwargs)
    if to_gpu or kwargs.get("device") is None:
        return on_device(gpu, func, args, kwargs)
    return func(*mapped(content_of, args), **kwargs)  # a new tensor on the host, as large as one on the GPU


def _scalar(gpu: SimulatedGpu, x: Tensor) -> Any:
    if not isinstance(x, GpuTensor):
        return on_host(gpu, aten._local_scalar_dense.default, (x,), {})
    launch(gpu, aten._local_scalar_dense.default, (x,), [x], [])
    return shapes.filled(x.content).item()


def _equal(gpu: SimulatedGpu, a: Tensor, b: Tensor) -> Any:
    tensors = [x for x in (a, b) if isinstance(x, GpuTensor)]
    if not tensors:
        return on_host(gpu, aten.equal.default, (a, b), {})
    check_devices(gpu, aten.equal.default, (a, b), [a, b])
    launch(gpu, aten.equal.default, (a, b), tensors, [])
    return torch.equal(shapes.filled(content_of(a)), shapes.filled(content_of(b)))


def _histc(gpu: SimulatedGpu, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A GPU counts integers too."""
    if isinstance(x, GpuTensor) and not x.is_floating_point():
        return on_device(gpu, aten.histc.default, (x.float(), *args), kwargs).to(x.dtype)
    return (on_device if isinstance(x, GpuTensor) else on_host)(gpu, aten.histc.default, (x, *args), kwargs)


SPECIAL: dict[Any, Callable[..., Any]] = {
    aten._to_copy.default: copies.to_copy,
    aten.copy_.default: copies.copy_,
    aten.is_pinned.default: copies.is_pinned,
    aten.pin_memory.default: copies.pin_memory,
    aten._pin_memory.default: copies.pin_memory,
    aten._local_scalar_dense.default: _scalar,
    aten.equal.default: _equal,
    aten.histc.default: _histc,
}
"""Operators that are about both sides, or that return numbers to the host."""

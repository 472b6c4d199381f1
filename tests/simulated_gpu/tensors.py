"""Tensors of the simulated GPU: wrappers with device ``cuda:0`` around tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.simulated_gpu.clocks import Spans
from tests.simulated_gpu.gpu import DeviceMemory, SimulatedGpu
from tests.simulated_gpu.streams import Stream

CUDA = torch.device("cuda", 0)


class GpuTensor(Tensor):
    """A tensor on the simulated GPU.

    Attributes:
        content: Its numbers, on the CPU; on the meta device if it has only a form.
        memory: The device memory that it views.
    """

    content: Tensor
    memory: DeviceMemory
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, content: Tensor, memory: DeviceMemory) -> GpuTensor:
        with torch.inference_mode(False):  # a view of an ordinary tensor must not be an inference tensor
            made: GpuTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                content.size(),
                strides=content.stride(),
                storage_offset=content.storage_offset(),
                dtype=content.dtype,
                layout=content.layout,
                device=CUDA,
                requires_grad=False,
            )
        made.content, made.memory = content, memory
        return made

    def __init__(self, content: Tensor, memory: DeviceMemory) -> None:
        """Everything is done in ``__new__``."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        from tests.simulated_gpu.dispatch import dispatch

        gpu = next(x.memory.gpu for x in tensors_in(args, kwargs) if isinstance(x, GpuTensor))
        return dispatch(gpu, func, args, kwargs or {})

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        """Keep the memory until what the stream does now is over."""
        self.memory.recorded.add(stream.agent)

    def detach(self) -> GpuTensor:
        return GpuTensor(self.content, self.memory)

    def requires_grad_(self, requires_grad: bool = True) -> GpuTensor:
        """Nothing is trained."""
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def as_subclass(self, cls: type) -> Any:
        return _on_gpu(cls)(self.content, self.memory)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone()
            memo[id(self)] = torch.nn.Parameter(copied) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GpuTensor({self.content!r}, device='cuda:0')"


@cache
def _on_gpu(cls: type) -> type:
    """A subclass of Tensor for tensors on the GPU."""
    return type(f"{cls.__name__}OnGpu", (cls, GpuTensor), {})


def new_on_gpu(gpu: SimulatedGpu, content: Tensor) -> GpuTensor:
    """Put a result into device memory of its own."""
    return GpuTensor(content, gpu.take(content.untyped_storage().nbytes()))


def content_of(x: Tensor) -> Tensor:
    """What a kernel works on."""
    return x.content if isinstance(x, GpuTensor) else x


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in an operator's arguments. torch's own trees take several times as long."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += tensors_in(*x)
        elif isinstance(x, dict):
            found += tensors_in(*x.values())
    return found


def mapped(change: Callable[[Tensor], Any], x: Any) -> Any:
    """An operator's arguments or results with each tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, list | tuple):
        return type(x)(mapped(change, y) for y in x)
    if isinstance(x, dict):
        return {key: mapped(change, y) for key, y in x.items()}
    return x


def start(x: GpuTensor) -> int:
    """The byte of its memory at which a tensor begins."""
    return int(x.content.storage_offset()) * x.content.element_size()


def extent(x: Tensor, begin: int) -> Spans:
    """The bytes from the first to the last element of a tensor, of which the first is at ``begin``."""
    if not x.numel():
        return []
    length = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return [(begin, begin + length * x.element_size())]

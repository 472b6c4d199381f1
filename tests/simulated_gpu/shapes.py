"""Large tensors without content: a tensor on the meta device stands for what a kernel would have computed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.simulated_gpu.gpu import SimulatedGpu
from tests.simulated_gpu.tensors import mapped, tensors_in

LARGE = 1 << 16
"""Elements of the largest tensors that keep their content; indices and masks keep it at any size."""


def computed(gpu: SimulatedGpu, func: Any, args: Any, kwargs: Any) -> Any:
    """Run a kernel on the CPU, or find the forms of its results if an operand has nothing else."""
    if not gpu.shapes_only:
        return func(*args, **kwargs)
    operands = tensors_in(args, kwargs)
    if not any(x.device.type == "meta" for x in operands):
        result = func(*args, **kwargs)
        is_new = not any(x.alias_info is not None for x in func._schema.returns)
        return mapped(partial(hollow, gpu), result) if is_new else result
    for value, argument in zip(args, func._schema.arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    result = func(*mapped(lambda x: x.to("meta"), args), **mapped(lambda x: x.to("meta"), kwargs))
    if isinstance(result, Tensor) and result.dtype == torch.bool:
        return func(*mapped(filled, args), **mapped(filled, kwargs))
    return result


def hollow(gpu: SimulatedGpu, x: Tensor) -> Tensor:
    """A tensor without its content, if it is large."""
    if not gpu.shapes_only or (not x.is_floating_point() and x.dtype != torch.uint8) or x.numel() <= LARGE or x.is_meta:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def filled(x: Tensor) -> Tensor:
    """Zeros for a tensor without content, where numbers are compared or the host reads them."""
    return torch.zeros((), dtype=x.dtype).expand(x.shape) if x.is_meta else x


def is_idle(func: Any, args: Any) -> bool:
    """Whether an operator of the CPU only fills a large tensor, which would take real memory."""
    name = func.name().split("::")[1].split(".")[0]
    return name in ("copy_", "fill_", "zero_", "index_copy_") and args[0].numel() > LARGE

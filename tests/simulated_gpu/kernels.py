"""Kernels of the simulated GPU: operands are checked, the CPU computes, and the stream is told what was read and written."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.simulated_gpu import shapes
from tests.simulated_gpu.clocks import Spans, joined
from tests.simulated_gpu.gpu import SimulatedGpu, Size
from tests.simulated_gpu.tensors import CUDA, GpuTensor, content_of, extent, mapped, new_on_gpu, start, tensors_in

aten = torch.ops.aten
WAITING = frozenset(
    (
        *("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
        *("bincount", "repeat_interleave"),
    )
)
"""Operators whose result the host must know."""
LAUNCH_NOTHING = frozenset(("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_local_scalar_dense"))
PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "scaled_dot_product_attention"))
WHOLE = frozenset(("scaled_dot_product_attention",))
"""Composite operators that a GPU computes in one kernel."""
OVERWRITES = frozenset(("copy_", "fill_", "zero_"))
"""Operators that do not read what they write."""
INDEXED = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))
ROWS_AT = {"index_select": 2, "index_copy_": 2, "embedding": 1}
"""Operators that touch rows of their first operand, and which argument names the rows."""


class Traits(NamedTuple):
    """What an operator's schema says.

    Attributes:
        name: Without namespace and overload.
        writes: Names and places of the arguments that it writes.
        is_view: Whether its result shares memory with an operand that it does not write.
        is_composite: Whether it is made of other operators.
        reads: Whether it reads its operands; ``zeros_like`` does not.
    """

    name: str
    writes: tuple[tuple[int, str], ...]
    is_view: bool
    is_composite: bool
    reads: bool


@cache
def traits(func: Any) -> Traits:
    """Read an operator's schema."""
    name = func.name().split("::")[1].split(".")[0]
    arguments = enumerate(func._schema.arguments)
    writes = tuple((i, x.name) for i, x in arguments if x.alias_info is not None and x.alias_info.is_write)
    is_view = not writes and any(x.alias_info is not None for x in func._schema.returns)
    composite = name not in WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return Traits(name, writes, is_view, composite, not name.startswith("new_") and not name.endswith("_like"))


def on_host(gpu: SimulatedGpu, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator of the CPU."""
    if gpu.pinned and not traits(func).is_view:
        written = _written(func, args, kwargs)
        for x in tensors_in(args, kwargs):
            touch(gpu, traits(func).name, x, writes=any(x is y for y in written))
    if gpu.shapes_only and shapes.is_idle(func, args):
        return args[0]
    return func(*args, **kwargs)


def on_device(gpu: SimulatedGpu, func: Any, args: Any, kwargs: Any) -> Any:
    """Launch an operator: its results are new tensors on the GPU, views of its operands, or operands that it wrote."""
    about = traits(func)
    operands = tensors_in(args, kwargs)
    if about.reads:
        check_devices(gpu, func, args, operands)
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    result = shapes.computed(gpu, func, mapped(content_of, args), mapped(content_of, kwargs))
    written = [x for x in _written(func, args, kwargs) if isinstance(x, GpuTensor)]
    viewed = {x.content.untyped_storage()._cdata: x.memory for x in operands if isinstance(x, GpuTensor) and x.content.numel()}
    fresh: list[GpuTensor] = []

    def wrap(x: Tensor) -> GpuTensor:
        for target in written:
            if target.content is x:
                return target
        memory = viewed.get(x.untyped_storage()._cdata)
        if memory is not None:
            return GpuTensor(x, memory)
        fresh.append(new_on_gpu(gpu, x))
        return fresh[-1]

    wrapped = mapped(wrap, result)
    if written or (fresh and not about.is_view):  # a view of nothing shares no memory
        reads = [x for x in operands if isinstance(x, GpuTensor) and about.reads and not any(x is y for y in written)]
        launch(gpu, func, args, reads, [*written, *fresh])
    return wrapped


def launch(gpu: SimulatedGpu, func: Any, args: Any, reads: list[GpuTensor], writes: list[GpuTensor]) -> None:
    name = traits(func).name
    parts = [[(x.memory, _spans(gpu, name, x, args)) for x in tensors] for tensors in (reads, writes)]
    forms = tuple(tuple(x.shape) for x in reads) if name in PRODUCTS else ()
    size = Size(_num_bytes(name, args, reads, writes), forms, reads[-1].element_size() if forms else 0)
    stream = gpu.run(None if name in LAUNCH_NOTHING else "launch", name, *parts, size=size)
    # Masks become indices, whose number the host must know; indices on the host are copied.
    if name in WAITING or (name in INDEXED and any(_is_mask(x) or not isinstance(x, GpuTensor) for x in tensors_in(args[1]))):
        gpu.finish(stream, name, [x.memory for x in (*reads, *writes)])


def touch(gpu: SimulatedGpu, what: str, x: Tensor, *, writes: bool) -> None:
    """Let the host read or write a tensor, which may be in pinned memory."""
    if isinstance(x, GpuTensor) or x.device.type != "cpu" or not gpu.pinned or not x.numel() or x.layout != torch.strided:
        return
    address = x.data_ptr()
    region = gpu.pinned_at(address)
    if region is not None:
        gpu.touch(what, region, extent(x, address - region.begin), writes=writes)


def _is_mask(x: Tensor) -> bool:
    return x.dtype in (torch.bool, torch.uint8)


def check_devices(gpu: SimulatedGpu, func: Any, args: Any, operands: list[Tensor]) -> None:
    """Refuse what CUDA refuses: only numbers without dimensions and indices may be on the host."""
    others = [x for x in operands if not isinstance(x, GpuTensor)]
    if others and traits(func).name in INDEXED and isinstance(args[0], GpuTensor):
        others = [x for x in others if not any(x is index for index in args[1])]
    others = [x for x in others if x.dim() or x.device.type != "cpu"]
    if others:
        message = f"{func} of tensors on {CUDA} and {others[0].device} in {gpu.site()}"
        gpu.mismatches[message] += 1
        raise RuntimeError(f"Expected all tensors to be on the same device (simulated): {message}")


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in traits(func).writes]
    return tensors_in(values)


def _num_bytes(name: str, args: Any, reads: list[GpuTensor], writes: list[GpuTensor]) -> int:
    """Bytes that a kernel reads and writes. Of an operand of which it touches rows, these are as many as it takes or gives."""
    rows = args[0] if (name in INDEXED or name in ROWS_AT) and args else None
    others = sum(_distinct_bytes(x) for x in (*reads, *writes) if x is not rows)
    if any(x is rows for x in reads):  # rows become the result
        return others + sum(_distinct_bytes(x) for x in writes)
    if any(x is rows for x in writes):  # the last operand becomes rows
        return others + sum(_distinct_bytes(x) for x in reads[-1:])
    changed = writes if name.endswith("_") and name not in OVERWRITES else []
    return others + sum(_distinct_bytes(x) for x in changed)


def _distinct_bytes(x: Tensor) -> int:
    """Bytes of a tensor's elements, each once where it is expanded."""
    return math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n) * x.element_size()


def _spans(gpu: SimulatedGpu, name: str, x: GpuTensor, args: Any) -> Spans:
    """The bytes of an operand that a kernel touches: if an index names rows of it, these rows."""
    content, begin = x.content, start(x)
    whole = [] if gpu.shapes_only else extent(content, begin)
    index = args[ROWS_AT[name]] if name in ROWS_AT and (name == "embedding" or args[1] == 0) else None
    if name in INDEXED and args[1]:
        index = args[1][0]
    if not whole or x is not args[0] or index is None or content.dim() < 2 or index.dtype == torch.bool:
        return whole
    step = content.stride(0) * content.element_size()
    size = extent(content[0], 0)[0][1]
    return joined([(begin + i * step, begin + i * step + size) for i in set(content_of(index).flatten().tolist())])

"""Whether the kernels of attention and unpacking serve, and how long they take beside torch's operators."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from flexgen_helm.attention.paged.trial import HeadShape, Trial, require_equal
from flexgen_helm.compression import columns
from flexgen_helm.compression.allocation import LADDERS
from flexgen_helm.compression.fused import unpack
from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.runs.gpu_check.copies import best_seconds
from flexgen_helm.runs.gpu_check.forms import MESSAGE
from flexgen_helm.runs.gpu_check.sizes import Sizes
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS

FORMATS = {"16 bits": PLAIN_CACHE, "kv4": CacheFormat(4, 4)}


def compare_kernel(sizes: Sizes) -> dict[str, Any]:
    """Try the kernel for each shape of heads and form of pages."""
    shapes = [HeadShape(num_heads, num_kv, dim, dim) for num_heads, num_kv, dim in sizes.kernel_heads]
    with torch.inference_mode(), PRECISE_PRODUCTS.hold():
        found = {
            f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.dim}, {name}": _tried(sizes, shape, cache_format)
            for shape in shapes
            for name, cache_format in FORMATS.items()
        }
        return found | {"unpacking of w4": _unpacked(sizes)}


def _tried(sizes: Sizes, shape: HeadShape, cache_format: CacheFormat) -> dict[str, Any]:
    """Compare answers and bits, then times of a row of prompts and of a decode row."""
    device = sizes.torch_device
    try:
        from flexgen_helm.attention.paged.attention import attend_row

        require_equal(attend_row, device, shape, cache_format, sizes.kernel_dtype)
    except Exception as error:  # compilers raise anything
        return {"does not serve": f"{type(error).__name__}: {str(error)[:MESSAGE]}"}
    trial = Trial(device, shape, cache_format, sizes.kernel_dtype, sizes.kernel_lengths)
    which, found = list(range(len(sizes.kernel_lengths))), {}
    for name, kernel in (("kernel", attend_row), ("by hand", None)):
        for row, make in (("prompts", trial.prompts), ("decode", trial.last_tokens)):
            found[f"{row}, {name}, ms"] = 1e3 * best_seconds(partial(_waited, make(which, kernel), device), sizes.rounds)
    return found


def _unpacked(sizes: Sizes) -> dict[str, Any]:
    """Compare a matrix of columns of several widths that is unpacked by the kernel and by operators."""
    device, dtype = sizes.torch_device, sizes.kernel_dtype
    try:
        unpack.require_equal(device, dtype)
    except Exception as error:  # compilers raise anything
        return {"does not serve": f"{type(error).__name__}: {str(error)[:MESSAGE]}"}
    weight = torch.randn(sizes.width // 4, sizes.width, generator=torch.Generator().manual_seed(0))
    widths = torch.full((sizes.width,), 4, dtype=torch.uint8)
    widths[::10] = 6
    stored = columns.quantize(weight, widths, LADDERS[4]).to(device)
    target = torch.empty(weight.shape, dtype=dtype, device=device)
    works = {
        "kernel": partial(unpack.unpack_columns, stored, target),
        "operators": lambda: target.copy_(columns.dequantize(stored)),
    }
    return {f"{name}, ms": 1e3 * best_seconds(partial(_waited, work, device), sizes.rounds) for name, work in works.items()}


def _waited(work: Any, device: torch.device) -> None:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)

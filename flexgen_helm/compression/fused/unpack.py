"""Launch the kernels that unpack weights, where they were tried and give the bits of torch's own operators."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from flexgen_helm.compression import columns, minmax
from flexgen_helm.compression.columns import Columns
from flexgen_helm.compression.minmax import MinMax, MinMaxCodes
from flexgen_helm.compression.packing import BLOCK_ROWS, packed_rows

logger = logging.getLogger(__name__)

OPTIONS = {"enable_fp_fusion": False}
"""No product is fused with a sum, which would round once where torch's operators round twice."""
TRIED = (150, 90)
"""Shape of the matrix that is tried: whole and broken blocks of rows, and tiles of columns."""


def unpack_columns(stored: Columns, target: Tensor) -> None:
    """Write a matrix, nothing but which takes memory.

    Args:
        stored: The stored matrix, with its unit on the device.
        target: ``[out, in]`` in float32, bfloat16 or float16 on the same device; numbers of a row are neighbours.
    """
    from flexgen_helm.compression.fused import kernel

    num_rows, num_columns = stored.shape
    assert isinstance(stored.unit, Tensor)
    assert target.stride(1) == 1 or num_columns == 1
    order, codes_at, first = stored.column_classes.sort(stable=True).indices, 0, 0
    for width, count in zip(stored.ladder, stored.counts, strict=True):
        if count:
            kernel.unpack_columns[_grid(num_rows, count)](
                stored.codes, order, stored.super_scales, stored.scales, stored.unit, target,
                codes_at, first, count, num_rows, num_columns, target.stride(0), BITS=width, **OPTIONS,
            )  # fmt: skip
        codes_at, first = codes_at + packed_rows(num_rows, width) * count, first + count


def unpack_minmax(stored: MinMaxCodes, target: Tensor) -> None:
    """Write a matrix, as `unpack_columns` does."""
    from flexgen_helm.compression.fused import kernel

    num_columns = stored.codes.shape[1]
    kernel.unpack_minmax[_grid(stored.num_rows, num_columns)](
        stored.codes, stored.scale, stored.minimum, target,
        stored.num_rows, num_columns, target.stride(0), BITS=stored.bits, GROUP=stored.group, **OPTIONS,
    )  # fmt: skip


@functools.cache
def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile for a device and give the bits of torch's operators; if not, the reason is logged.

    Args:
        device: The device.
        dtype: Dtype of the weights.
    """
    if device.type != "cuda":
        return False
    try:
        require_equal(device, dtype)
    except Exception as error:  # compilers raise anything
        logger.warning("weights are unpacked by several operators, since the Triton kernel does not serve here: %s", error)
        return False
    return True


def require_equal(device: torch.device, dtype: torch.dtype) -> None:
    """Compare the kernels with torch's operators.

    Raises:
        RuntimeError: If they differ.
    """
    weight = torch.randn(TRIED, generator=torch.Generator().manual_seed(0))
    for ladder in ((2, 3, 4), (4, 5, 6, 8)):
        widths = torch.tensor(ladder, dtype=torch.uint8)[torch.arange(TRIED[1]) % len(ladder)]
        stored = columns.quantize(weight, widths, ladder).to(device)
        _compare(functools.partial(unpack_columns, stored), columns.dequantize(stored), dtype)
    for bits in (2, 3, 4, 8):
        codes = MinMax(bits).quantize(weight)
        codes = MinMaxCodes(
            codes.num_rows, bits, codes.group, *(x.to(device) for x in (codes.codes, codes.scale, codes.minimum))
        )
        _compare(functools.partial(unpack_minmax, codes), minmax.dequantize(codes), dtype)


def _compare(unpack: functools.partial[None], expected: Tensor, dtype: torch.dtype) -> None:
    target = torch.empty(expected.shape, dtype=dtype, device=expected.device)
    unpack(target)
    if not torch.equal(target, expected.to(dtype)):
        raise RuntimeError("its weights differ from those of torch's operators")


def _grid(num_rows: int, num_columns: int) -> tuple[int, int]:
    """A program for each block of rows and tile of columns."""
    return -(-num_rows // BLOCK_ROWS), -(-num_columns // BLOCK_ROWS)

"""Products of 16-bit matrices in float32, for processors that multiply 16 bits slowly.

Without AVX-512, torch's products in bfloat16 reach a fifth of the rate of those in float32 (runs/LOG.md, 2026-11-30). So a
slice of the weight is widened into a buffer that stays in the cache, and multiplied there. Outputs are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexgen_helm.machine.slices import slice_features

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A function like `torch.nn.functional.linear`: inputs ``[..., in]``, weight ``[out, in]`` and bias ``[out]`` to
``[..., out]``."""
WIDENED_DTYPES = (torch.bfloat16, torch.float16)
LEAST_TOKENS = 16
"""Fewer tokens are multiplied as so many: MKL has other kernels, with other bits, for up to 3 tokens on AMD and 15 on Intel."""


class WidenedProduct:
    """A `Product` of 16-bit matrices on the CPU by a product in float32. Two threads must not use one at the same time."""

    def __init__(self, product: Product) -> None:
        """Take no memory yet.

        Args:
            product: Multiplies in float32.
        """
        self._product = product
        self._scratch: Tensor | None = None

    def __deepcopy__(self, memo: object) -> WidenedProduct:
        """Copy a model without the buffer of its products."""
        return WidenedProduct(self._product)

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply; matrices of other dtypes are multiplied as they are.

        Args:
            inputs: ``[..., in]``.
            weight: ``[out, in]``, rows or columns side by side.
            bias: ``[out]``, or None; it is added before the output is rounded.

        Returns:
            ``[..., out]`` in the dtype of the inputs.
        """
        if weight.dtype not in WIDENED_DTYPES:
            return self._product(inputs, weight, bias)
        tokens = inputs.reshape(-1, inputs.shape[-1]).float()
        count, size = len(tokens), slice_features(weight.shape[1])
        if count < LEAST_TOKENS:
            tokens = pad(tokens, (0, 0, 0, LEAST_TOKENS - count))
        biases = None if bias is None else bias.float()
        output = inputs.new_empty(count, len(weight))
        for first in range(0, len(weight), size):
            part = slice(first, first + size)
            product = self._product(tokens, self._widened(weight[part]), None if biases is None else biases[part])
            output[:, part] = product[:count]
        return output.view(*inputs.shape[:-1], len(weight))

    def _widened(self, piece: Tensor) -> Tensor:
        """Return a slice ``[features, in]`` in float32, in the buffer and in the weight's own order."""
        if self._scratch is None or self._scratch.numel() < piece.numel():
            with torch.inference_mode(False):  # a tensor of that mode could not be written outside of it
                self._scratch = torch.empty(piece.numel(), dtype=torch.float32)
        flat = self._scratch[: piece.numel()]
        is_transposed = piece.stride(0) == 1 and piece.stride(1) != 1
        target = flat.view(piece.shape[::-1]).T if is_transposed else flat.view(piece.shape)
        return target.copy_(piece.detach())

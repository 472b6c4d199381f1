"""Observe the inputs of a layer's matrices while it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexgen_helm.compression.matrices import MatrixTensor
from flexgen_helm.machine.matmul import Product
from flexgen_helm.model.linear import PRODUCT_NAME, has_experts, product_of

FEWEST_TOKENS = 16
"""An expert that saw fewer tokens takes the mean of the layer's experts."""


class InputMoments:
    """Mean squares of the inputs of n matrices of one tensor."""

    def __init__(self, num_matrices: int, num_inputs: int) -> None:
        """Nothing is seen yet."""
        self._sums = torch.zeros(num_matrices, num_inputs, dtype=torch.float64)
        self._counts = torch.zeros(num_matrices, dtype=torch.float64)

    def add(self, number: int, inputs: Tensor, num_tokens: int | None = None) -> None:
        """Add inputs ``[..., in]`` of a matrix.

        Args:
            number: Number of the matrix.
            inputs: Inputs; those that are padding are zeros.
            num_tokens: Tokens that are no padding; None: all.
        """
        tokens = inputs.detach().reshape(-1, inputs.shape[-1])
        self._sums[number] += tokens.float().square().sum(0).cpu()
        self._counts[number] += len(tokens) if num_tokens is None else num_tokens

    @property
    def moments(self) -> Tensor:
        """Mean square of each input, fp32 ``[n, in]``; that of all matrices for those that saw too few tokens."""
        whole = self._sums.sum(0) / self._counts.sum().clamp(min=1)
        own = self._sums / self._counts.clamp(min=1)[:, None]
        return torch.where((self._counts >= FEWEST_TOKENS)[:, None], own, whole).float()


@contextmanager
def observed(layer: nn.Module, tensors: Sequence[MatrixTensor]) -> Iterator[dict[str, InputMoments]]:
    """Observe the inputs of tensors of a layer, by the tensors' names, while the context lasts.

    Args:
        layer: The layer, filled with its weights.
        tensors: Its tensors that hold matrices.
    """
    found: dict[str, InputMoments] = {}
    with ExitStack() as stack:
        for tensor in tensors:
            module = layer.get_submodule(tensor.module)
            matrices = tensor.matrices(module.get_parameter(tensor.parameter))
            found[tensor.name] = InputMoments(len(matrices), matrices.shape[2])
            if not has_experts(module):
                handle = module.register_forward_pre_hook(partial(_see, found[tensor.name]))
                stack.callback(handle.remove)
        for experts in {tensor.module for tensor in tensors}:
            module = layer.get_submodule(experts)
            if has_experts(module):
                places = {
                    x.parameter: (module.get_parameter(x.parameter), found[x.name]) for x in tensors if x.module == experts
                }
                before = product_of(module)
                module.__dict__[PRODUCT_NAME] = partial(_multiply, before, list(places.values()))
                stack.callback(module.__dict__.__setitem__, PRODUCT_NAME, before)
        yield found


def _see(moments: InputMoments, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    moments.add(0, arguments[0])


def _multiply(
    product: Product, places: list[tuple[Tensor, InputMoments]], inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply with the weight of an expert, which is a part of one of the tensors."""
    for tensor, moments in places:
        number, rest = divmod(weight.data_ptr() - tensor.data_ptr(), tensor[0].nbytes)
        if rest == 0 and 0 <= number < len(tensor):
            moments.add(number, inputs, num_tokens=int(inputs.any(-1).sum()))
    return product(inputs, weight, bias)

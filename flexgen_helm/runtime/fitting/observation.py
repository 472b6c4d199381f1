"""Observe the inputs of a layer's matrices while it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexgen_helm.compression.matrices import MatrixTensor
from flexgen_helm.compression.statistics import ColumnStatistics
from flexgen_helm.machine.matmul import Product
from flexgen_helm.model.linear import PRODUCT_NAME, has_experts, product_of

FEWEST_TOKENS = 16
"""An expert that saw fewer tokens takes the mean of the layer's experts."""


class InputMoments:
    """Mean squares of the inputs of n matrices of one tensor."""

    def __init__(self, num_matrices: int, num_inputs: int) -> None:
        """Nothing is seen yet."""
        self._whole = ColumnStatistics(num_inputs)
        self._own = [ColumnStatistics(num_inputs) for _ in range(num_matrices)]

    def add(self, number: int, inputs: Tensor) -> None:
        """Add inputs ``[..., in]`` of a matrix."""
        tokens = inputs.detach().reshape(-1, inputs.shape[-1])
        for each in (self._own[number], self._whole):
            each.add(tokens)

    @property
    def moments(self) -> Tensor:
        """Mean square of each input, fp32 ``[n, in]``; that of all matrices for those that saw too few tokens."""
        found = [each if each.num_tokens >= FEWEST_TOKENS else self._whole for each in self._own]
        return torch.stack([each.moment for each in found])


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
            moments.add(number, inputs[inputs.any(-1)])  # zeros are padding
    return product(inputs, weight, bias)

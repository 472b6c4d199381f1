"""Observe what errors of a layer's matrices do to its output: gradients of probes, within the layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn

from flexgen_helm.compression.matrices import MatrixTensor
from flexgen_helm.compression.sensitivity import Sensitivity, SensitivityStatistics, probe
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.machine.widened import Product
from flexgen_helm.model.linear import PRODUCT_NAME, has_experts, product_of, use_matmul
from flexgen_helm.model.recorder import RecordedModel, Recording

FEWEST_TOKENS = 16
"""An expert that saw fewer tokens takes the mean of the layer's experts."""


class Gradients:
    """Sensitivities of the n matrices of one tensor."""

    def __init__(self, num_matrices: int, num_inputs: int, num_outputs: int) -> None:
        """Nothing is seen yet."""
        self._own = [SensitivityStatistics(num_inputs, num_outputs) for _ in range(num_matrices)]

    def watch(self, number: int, inputs: Tensor, output: Tensor) -> None:
        """Count inputs ``[..., in]`` of a matrix once the gradient at its output ``[..., out]`` is known."""
        seen = inputs.detach().reshape(-1, inputs.shape[-1])
        output.register_hook(lambda gradient: self._add(number, seen, gradient.reshape(-1, gradient.shape[-1])))

    def _add(self, number: int, inputs: Tensor, gradients: Tensor) -> None:
        known = inputs.any(-1)  # zeros are padding
        self._own[number].add(inputs[known], gradients[known])

    def means(self, num_tokens: int) -> list[Sensitivity]:
        """Return the means over so many tokens; of all matrices for an expert that saw too few.

        Args:
            num_tokens: Tokens of the text, whether a matrix saw them or not: what is rarely used matters less.
        """
        sums = torch.stack([x.columns for x in self._own]), torch.stack([x.rows for x in self._own])
        columns, rows = ((x.mean(0) / num_tokens).float() for x in sums)
        return [
            # Each has memory of its own, which the files of statistics need.
            x.mean(num_tokens) if x.num_tokens >= FEWEST_TOKENS else Sensitivity(columns.clone(), rows.clone())
            for x in self._own
        ]


def known_sensitivities(seen: Mapping[str, Gradients], num_tokens: int) -> dict[str, list[Sensitivity]]:
    """Return the sensitivities of the matrices of a layer, by the names of their tensors.

    A matrix without gradients matters as much as the layer's median: one that is multiplied outside of its module, as
    Mamba's ``dt_proj``, or that only decides what is chosen.

    Args:
        seen: What was observed of each tensor.
        num_tokens: Tokens of the text.
    """
    found = {name: each.means(num_tokens) for name, each in seen.items()}
    # Of one weight: what its error adds to the relative error of the layer's output, as a mean over the matrix.
    means = [float(x.columns.mean()) / len(x.rows) for known in found.values() for x in known]
    typical = median_low([mean for mean in means if mean > 0] or [0.0])
    return {name: [x if x.columns.any() else _typical(x, typical) for x in known] for name, known in found.items()}


def _typical(shaped: Sensitivity, mean: float) -> Sensitivity:
    return Sensitivity(torch.full_like(shaped.columns, mean * len(shaped.rows)), torch.ones_like(shaped.rows))


def replay_with_gradients(model: RecordedModel, j: int, row: Recording, seed: int) -> None:
    """Run a layer on a row and compute the gradients of probes of its output. Nothing is differentiated beyond the layer.

    Raises:
        UnsupportedModel: If the layer cannot be differentiated.
    """
    assert row.hidden is not None
    row.hidden = row.hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        model.replay(j, row)
        try:
            (row.hidden * probe(row.hidden, torch.Generator().manual_seed(seed))).sum().backward()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedModel(
                f"Layer {j} cannot be differentiated ({error}), which all compressed weights but `-minmax` need. Use `-minmax`."
            ) from error
    row.hidden = row.hidden.detach()
    row.extra_outputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in row.extra_outputs)


@contextmanager
def watched(layer: nn.Module, tensors: Sequence[MatrixTensor]) -> Iterator[dict[str, Gradients]]:
    """Observe gradients at the outputs of tensors of a layer, by the tensors' names, while the context lasts.

    Args:
        layer: The layer, filled with its weights. From now on it multiplies with torch, and its weights have no gradients.
        tensors: Its tensors that hold matrices.
    """
    found: dict[str, Gradients] = {}
    layer.requires_grad_(False)
    use_matmul(layer.modules(), "torch")  # oneDNN's products have no gradients
    with ExitStack() as stack:
        experts: dict[nn.Module, list[tuple[Tensor, Gradients]]] = {}
        for tensor in tensors:
            module = layer.get_submodule(tensor.module)
            parameter = module.get_parameter(tensor.parameter)
            matrices = tensor.matrices(parameter)
            own = found[tensor.name] = Gradients(len(matrices), matrices.shape[2], matrices.shape[1])
            if has_experts(module):
                experts.setdefault(module, []).append((parameter, own))
            else:
                stack.callback(module.register_forward_hook(partial(_see, own)).remove)
        for module, places in experts.items():
            before = product_of(module)
            module.__dict__[PRODUCT_NAME] = partial(_multiply, before, places)
            stack.callback(module.__dict__.__setitem__, PRODUCT_NAME, before)
        yield found


def _see(own: Gradients, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
    if output.requires_grad:
        own.watch(0, arguments[0], output)


def _multiply(
    product: Product, places: list[tuple[Tensor, Gradients]], inputs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply with the weight of an expert, which is a part of one of the tensors."""
    output = product(inputs, weight, bias)
    for tensor, own in places:
        number, rest = divmod(weight.data_ptr() - tensor.data_ptr(), tensor[0].nbytes)
        if output.requires_grad and rest == 0 and 0 <= number < len(tensor):
            own.watch(number, inputs, output)
    return output

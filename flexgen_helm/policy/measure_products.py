"""Measure matrix products of linear layers, by the library with which the engine multiplies."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from flexgen_helm.machine.matmul import faster_matmul, packed, product_by
from flexgen_helm.machine.profile import ProductRate
from flexgen_helm.machine.rates import READ_BYTES, random_numbers
from flexgen_helm.machine.rounds import rate_of, seconds_of

Shape = tuple[int, int]
"""Outputs and inputs of a matrix."""
STANDARD_SHAPES: tuple[Shape, ...] = ((1536, 1536), (4096, 1536), (1536, 4096))
"""Of a layer where no model is named."""
MOST_OPERATIONS = {"cpu": 2e9, "cuda": 4e12}
"""By type of device: of one pass over the matrices of a layer. Larger layers are measured with fewer outputs."""
LEAST_OUTPUTS = 256


def layer_matrices(layer: nn.Module, num_experts: int | None = None) -> list[Shape]:
    """Return the matrices by which a token is multiplied in a layer, which may be on the meta device.

    Args:
        layer: The layer.
        num_experts: Experts that a token uses; None: all.
    """
    found: list[Shape] = []
    for weight in layer.parameters():
        if weight.dim() == 2:
            found.append((weight.shape[0], weight.shape[1]))
        elif weight.dim() == 3:
            found += [(weight.shape[1], weight.shape[2])] * min(weight.shape[0], num_experts or weight.shape[0])
    return found


def product_rates(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape], tokens: Iterable[int]
) -> Iterator[ProductRate]:
    """Measure the products of a layer, as many layers in turn as make weights come from memory.

    On a CPU whose library can pack weights, packed ones are measured too.

    Args:
        device: The device.
        dtype: Of weights and inputs.
        shapes: The matrices of a layer.
        tokens: Numbers of tokens that meet a matrix at a time.
    """
    library = faster_matmul(device, dtype)
    product = product_by(library)
    counts = list(tokens)
    layers = _layers(device, dtype, _bounded(shapes, max(counts), MOST_OPERATIONS[device.type]))
    for is_packed in (False, True) if library == "onednn" else (False,):
        if is_packed:
            layers = [[packed(weight, max(counts)) for weight in layer] for layer in layers]
        for count in counts:
            inputs = {n: random_numbers((count, n), device, dtype) for n in {weight.shape[1] for weight in layers[0]}}
            turn = itertools.cycle(layers)

            def multiply(turn: Iterator[list[Tensor]] = turn, inputs: dict[int, Tensor] = inputs) -> None:
                for weight in next(turn):
                    product(inputs[weight.shape[1]], weight, None)

            operations = 2 * count * sum(weight.shape[0] * weight.shape[1] for weight in layers[0])
            with torch.inference_mode():
                rate = rate_of(operations, seconds_of(multiply, device))
            yield ProductRate(str(dtype).removeprefix("torch."), count, rate, is_packed)


def _bounded(shapes: Sequence[Shape], tokens: int, most: float) -> list[Shape]:
    """Return matrices with so few outputs that a pass takes few operations."""
    share = min(1.0, most / (2 * tokens * sum(outputs * inputs for outputs, inputs in shapes)))
    return [(max(min(outputs, LEAST_OUTPUTS), round(outputs * share)), inputs) for outputs, inputs in shapes]


def _layers(device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape]) -> list[list[Tensor]]:
    """Return equal layers that together are larger than caches."""
    size = sum(outputs * inputs for outputs, inputs in shapes) * dtype.itemsize
    count = -(-READ_BYTES[device.type] // size)
    return [[random_numbers(shape, device, dtype) for shape in shapes] for _ in range(count)]

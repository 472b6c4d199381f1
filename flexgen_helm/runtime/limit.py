"""What the machine could reach at best: a bound from measured rates, to judge a run by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from flexgen_helm.types import RunStats

MEASURED_SECONDS = 0.2
PRODUCT_TOKENS, PRODUCT_WIDTH = 512, 2048
READ_BYTES = 2**27
"""Larger than the caches of a processor, so that memory is what is measured."""


@dataclass(frozen=True)
class Rates:
    """What one machine reached in a fraction of a second."""

    multiply: float
    """Floating-point operations per second of a matrix product."""
    read: float
    """Bytes per second that are read from where the weights are."""


@dataclass(frozen=True)
class LayerSizes:
    """What passing through all decoder layers costs."""

    num_bytes: int
    active_weights: float
    """Entries of the matrices that a token meets; of a mixture of experts those of its experts."""


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure matrix product and memory for MEASURED_SECONDS each; what the threads of this process reach."""
    with torch.inference_mode():
        x = torch.ones(PRODUCT_TOKENS, PRODUCT_WIDTH, device=device, dtype=dtype)
        weight = torch.ones(PRODUCT_WIDTH, PRODUCT_WIDTH, device=device, dtype=dtype)
        memory = torch.zeros(READ_BYTES // 4, device=device, dtype=torch.float32)
        multiply = _per_second(lambda: nn.functional.linear(x, weight), device) * 2 * PRODUCT_TOKENS * PRODUCT_WIDTH**2
        read = _per_second(lambda: memory.sum(), device) * READ_BYTES
    return Rates(multiply, read)


def _per_second(work: Callable[[], object], device: torch.device) -> float:
    count, started = -1, time.perf_counter()  # the first call only warms up
    while count < 1 or time.perf_counter() - started < MEASURED_SECONDS:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
        if count == 0:
            started = time.perf_counter()
    return count / (time.perf_counter() - started)


def layer_sizes(layers: Iterable[nn.Module], experts_per_token: int | None) -> LayerSizes | None:
    """Count the weights of decoder layers.

    Args:
        layers: All decoder layers.
        experts_per_token: From the config of a mixture of experts.

    Returns:
        The sizes; None for a mixture of experts whose config does not say how many of them a token meets.
    """
    num_bytes, active = 0, 0.0
    for module in (module for layer in layers for module in layer.modules()):
        num_experts = getattr(module, "num_experts", None)
        for weight in module.parameters(recurse=False):
            num_bytes += weight.numel() * weight.element_size()
            if weight.dim() == 3 and isinstance(num_experts, int):
                if experts_per_token is None:
                    return None
                active += weight.numel() * experts_per_token / num_experts
            elif weight.dim() > 1:
                active += weight.numel()
    return LayerSizes(num_bytes, active)


def limit_seconds(stats: RunStats, sizes: LayerSizes, rates: Rates) -> float:
    """The least time in which a run's layers could have been computed.

    Every sweep reads all weights once, and every token that was computed takes two operations for each weight that it
    meets; attention, output head and padding are left out. An estimate: rates move with what else the machine does, and weights
    that stay in a processor's cache are read faster than memory.
    """
    tokens = stats.prompt_tokens_computed + stats.generated_tokens
    return max(stats.sweeps * sizes.num_bytes / rates.read, 2 * tokens * sizes.active_weights / rates.multiply)

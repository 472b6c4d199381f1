"""Roofline: the least time in which this machine could do a run, from measured rates.

A sweep takes at least as long as its slowest resource if all resources work in parallel: links and disk for the bytes that
are moved, memory for the weights that are read, matrix products for every token, the CPU for the K and V to which it attends
(the quantities of FlexGen section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from flexgen_helm.machine.rates import Rates
from flexgen_helm.run_stats import RunStats, SweepStats

LEAST_WIDTH = 1024
"""Outputs and inputs of the smallest matrix whose products are measured; smaller ones would measure the overhead of calls."""


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of the decoder layers and the output head, and the bytes of weights that a sweep must move."""

    num_bytes: int
    """Bytes of all weights."""
    active_weights: float
    """Elements of the layers' matrices by which a token is multiplied; in a mixture of experts only those of its experts."""
    head_weights: int = 0
    """Elements of the output head's matrix, which multiplies only tokens whose logits are needed."""
    from_disk: int = 0
    """Bytes of weights that a sweep reads from the disk."""
    to_device: int = 0
    """Bytes of weights that a sweep brings over the link to a device with a memory of its own."""
    widest: tuple[int, int] = (LEAST_WIDTH, LEAST_WIDTH)
    """Outputs and inputs of the largest matrix."""


def layer_sizes(
    layers: Iterable[nn.Module],
    experts_per_token: int | None,
    head: nn.Module | None = None,
    *,
    from_disk: int = 0,
    to_device: int = 0,
) -> LayerSizes | None:
    """Count the weights of decoder layers, which may be on the meta device.

    Args:
        layers: All decoder layers.
        experts_per_token: Experts that a token uses, from the config; None if the config does not say.
        head: The output head.
        from_disk: Bytes of weights that a sweep in column order must read from the disk.
        to_device: Bytes of weights that a sweep in column order must bring over the link to the device.

    Returns:
        The sizes; None for a mixture of experts whose config does not say how many experts a token uses.
    """
    num_bytes, active, widest = 0, 0.0, (LEAST_WIDTH, LEAST_WIDTH)
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
            if weight.dim() > 1:
                widest = max(widest, (weight.shape[-2], weight.shape[-1]), key=math.prod)
    matrices = [] if head is None else [weight for weight in head.parameters() if weight.dim() > 1]
    num_bytes += sum(weight.numel() * weight.element_size() for weight in matrices)
    head_weights = sum(weight.numel() for weight in matrices)
    return LayerSizes(num_bytes, active, head_weights, from_disk, to_device, widest)


def with_limit(stats: RunStats, sizes: LayerSizes, rates: Rates) -> RunStats:
    """Return a run's stats with the limit of each sweep, which is what the slowest resource needs at least, and their sum.

    Weights count once in each sweep, however often they were moved; other transfers count as measured. A token takes two
    operations for each weight by which it is multiplied. Attention scores, K and V that the device reads from its own
    memory, and padding are left out. The limit is an estimate: rates change with the machine's other load, and weights in a
    processor's cache are read faster than memory.
    """
    seconds = [sweep_seconds(sweep, sizes, rates) for sweep in stats.per_sweep]
    least = {name: sum(sweep[name] for sweep in seconds) for name in (seconds[0] if seconds else ())}
    sweeps = [_limited(sweep, each) for sweep, each in zip(stats.per_sweep, seconds, strict=True)]
    total = sum(max(each.values()) for each in seconds)
    return replace(stats, limit_seconds=total, limit_unknown="", least_seconds=least, per_sweep=sweeps)


def _limited(sweep: SweepStats, seconds: dict[str, float]) -> SweepStats:
    slowest = max(seconds, key=seconds.__getitem__)
    return replace(sweep, limit_seconds=seconds[slowest], limited_by=slowest)


def sweep_seconds(sweep: SweepStats, sizes: LayerSizes, rates: Rates) -> dict[str, float]:
    """Return the least time in seconds that each resource needs for a sweep, by the name of its rate."""
    weights = {"disk_read": sizes.from_disk, "host_to_device": sizes.to_device}
    seconds = {"read": sizes.num_bytes / rates.read}
    for link in ("host_to_device", "device_to_host", "disk_read", "disk_write", "cpu_attention"):
        others = sweep.bytes_moved.get(link, 0) - sweep.weight_bytes_moved.get(link, 0)
        seconds[link] = (weights.get(link, 0) + others) / getattr(rates, link)
    products = sizes.active_weights * sweep.prompt_tokens / rates.prefill
    products += (sizes.active_weights * sweep.decode_tokens + sizes.head_weights * sweep.generated_tokens) / rates.decode
    return seconds | {"products": 2 * products}

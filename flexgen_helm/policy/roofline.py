"""What the machine could reach at best: a bound from measured rates, to judge a run by.

A sweep takes at least as long as its slowest resource if all of them work beside each other: links and disk for what must
pass them, memory for the weights that are read, matrix products for what every token meets, the CPU for the K and V to which
it attends (the quantities of FlexGen section 4.3).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from flexgen_helm.machine.disk_rate import disk_rates
from flexgen_helm.types import ResolvedPolicy, RunStats, SweepStats

MEASURED_SECONDS = 0.3
ROUND_SECONDS = 0.005
LEAST_WIDTH = 1024
"""Of measured products: smaller ones would measure the calls."""
READ_BYTES = 2**27
"""Larger than the caches of a processor, so that memory is what is measured."""
NUM_CACHES, NUM_KV_HEADS, NUM_KEYS, HEAD_DIM = 16, 8, 1024, 128
"""Of measured attention: a decode step of 16 sequences, whose K and V are larger than a processor's caches."""


@dataclass(frozen=True)
class Rates:
    """What one machine reached in a fraction of a second; infinite where nothing was asked of it. Bytes are per second."""

    prefill: float
    """Floating-point operations per second of a matrix product with as many tokens as a prefill row has."""
    decode: float
    """The same with as many as a decode row has."""
    read: float
    """Bytes that are read from the memory in which the device multiplies."""
    host_to_device: float = math.inf
    device_to_host: float = math.inf
    disk_read: float = math.inf
    disk_write: float = math.inf
    cpu_attention: float = math.inf
    """Bytes of K and V that attention reads on the CPU."""


@dataclass(frozen=True)
class LayerSizes:
    """What a sweep has to do with the weights of the decoder layers and of the output head."""

    num_bytes: int
    active_weights: float
    """Entries of the layers' matrices that a token meets; of a mixture of experts those of its experts."""
    head_weights: int = 0
    """Entries of the output head's matrix, which a token meets if another one is chosen behind it."""
    from_host: int = 0
    """Bytes that a sweep brings to the device from the host."""
    from_disk: int = 0
    """Bytes that it brings from the disk."""
    own_memory: bool = False
    """Whether what comes from the disk has to pass a link from the host to the device."""
    widest: tuple[int, int] = (LEAST_WIDTH, LEAST_WIDTH)
    """Outputs and inputs of the largest matrix."""


def layer_sizes(
    layers: Iterable[nn.Module],
    experts_per_token: int | None,
    head: nn.Module | None = None,
    *,
    from_host: int = 0,
    from_disk: int = 0,
    own_memory: bool = False,
) -> LayerSizes | None:
    """Count the weights of decoder layers, which may be on meta.

    Args:
        layers: All decoder layers.
        experts_per_token: From the config of a mixture of experts.
        head: The output head.
        from_host: Bytes of weights that a sweep in column order must bring from the host.
        from_disk: The same from the disk.
        own_memory: Whether the device has a memory of its own.

    Returns:
        The sizes; None for a mixture of experts whose config does not say how many of them a token meets.
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
    return LayerSizes(num_bytes, active, head_weights, from_host, from_disk, own_memory, widest)


def note_limit(stats: RunStats, sizes: LayerSizes, rates: Rates) -> None:
    """Fill in the least time in which a run's sweeps could have been computed: of each its slowest resource, in turn.

    Weights count once in each sweep however often they were moved, other transfers as they were measured. A token
    takes two operations for each weight that it meets. Scores of attention, K and V that the device reads from its own
    memory, and padding are left out. An estimate: rates move with what else the machine does, and weights that stay in a
    processor's cache are read faster than memory.
    """
    sweeps = [sweep_seconds(sweep, sizes, rates) for sweep in stats.per_sweep]
    stats.limit_seconds = sum(max(sweep.values()) for sweep in sweeps)
    stats.least_seconds = {name: sum(sweep[name] for sweep in sweeps) for name in (sweeps[0] if sweeps else ())}


def sweep_seconds(sweep: SweepStats, sizes: LayerSizes, rates: Rates) -> dict[str, float]:
    """The least time that each resource needs for a sweep, in seconds, by the name of its rate."""
    from_disk = {"disk_read": sizes.from_disk, "host_to_device": sizes.from_disk * sizes.own_memory + sizes.from_host}
    seconds = {"read": sizes.num_bytes / rates.read}
    for link in ("host_to_device", "device_to_host", "disk_read", "disk_write", "cpu_attention"):
        others = sweep.bytes_moved.get(link, 0) - sweep.weight_bytes_moved.get(link, 0)
        seconds[link] = (from_disk.get(link, 0) + others) / getattr(rates, link)
    products = sizes.active_weights * sweep.prompt_tokens / rates.prefill
    products += (sizes.active_weights * sweep.decode_tokens + sizes.head_weights * sweep.generated_tokens) / rates.decode
    return seconds | {"products": 2 * products}


def measure_rates(
    device: torch.device, dtype: torch.dtype, *, sizes: LayerSizes, policy: ResolvedPolicy, stats: RunStats, folder: Path | None
) -> Rates:
    """Measure what a run used, each for a fraction of a second, by the threads of this process; all but the disk only once.

    Args:
        device: Where the matrices were multiplied.
        dtype: Of the weights.
        sizes: Of the model.
        policy: Its row sizes are those of the products.
        stats: Of the run.
        folder: On the disk; None where the run used none.

    Raises:
        FlexGenError: If the disk cannot be measured.
    """
    moved = stats.bytes_moved
    rates = {
        "prefill": product_rate(device, dtype, policy.gpu_batch_tokens, sizes.widest),
        "decode": product_rate(device, dtype, policy.gpu_batch_size, sizes.widest),
        "read": read_rate(device),
    }
    if moved.get("host_to_device") or moved.get("device_to_host"):
        rates["host_to_device"], rates["device_to_host"] = link_rates(device)
    if folder is not None and (moved.get("disk_read") or moved.get("disk_write")):
        rates["disk_read"], rates["disk_write"] = disk_rates(folder)
    if moved.get("cpu_attention"):
        rates["cpu_attention"] = cpu_attention_rate(dtype)
    return Rates(**rates)


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype, num_tokens: int, widest: tuple[int, int]) -> float:
    """Floating-point operations per second of ``num_tokens`` tokens meeting one matrix."""
    with torch.inference_mode():
        x = torch.ones(num_tokens, widest[1], device=device, dtype=dtype)
        weight = torch.ones(widest, device=device, dtype=dtype)
        return _per_second(lambda: linear(x, weight), device) * 2 * num_tokens * widest[0] * widest[1]


@functools.cache
def read_rate(device: torch.device) -> float:
    """Bytes per second read from memory."""
    memory = torch.zeros(READ_BYTES // 4, device=device)
    return _per_second(lambda: memory.sum(), device) * READ_BYTES


@functools.cache
def link_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second copied to the device and back, from and to pinned memory."""
    host = torch.zeros(READ_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.zeros(READ_BYTES, dtype=torch.uint8, device=device)
    to_device = _per_second(lambda: there.copy_(host, non_blocking=True), device)
    to_host = _per_second(lambda: host.copy_(there, non_blocking=True), device)
    return to_device * READ_BYTES, to_host * READ_BYTES


@functools.cache
def cpu_attention_rate(dtype: torch.dtype) -> float:
    """Bytes of K and V per second that PyTorch's own attention reads on the CPU, with one query for each K or four."""
    keys, values = torch.zeros(2, NUM_CACHES, NUM_KV_HEADS, NUM_KEYS, HEAD_DIM, dtype=dtype).unbind()
    rates = []
    for num_queries in (1, 4):
        queries = torch.zeros(NUM_CACHES, NUM_KV_HEADS, num_queries, HEAD_DIM, dtype=dtype)
        with torch.inference_mode():
            attend = functools.partial(scaled_dot_product_attention, queries, keys, values)
            rates.append(_per_second(attend, torch.device("cpu")))
    return max(rates) * 2 * keys.numel() * keys.element_size()


def _per_second(work: Callable[[], object], device: torch.device) -> float:
    """Calls per second in the best round: what else the machine did meanwhile must not count."""
    count, fastest, stop = 1, math.inf, time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < stop or fastest == math.inf:
        begun = time.perf_counter()
        for _ in range(count):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
        if seconds < ROUND_SECONDS:
            count *= 2  # too short a round would measure the waiting for a GPU; the first ones warm up
        else:
            fastest = min(fastest, seconds / count)
    return 1 / fastest

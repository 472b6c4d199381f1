"""Rates that this machine reaches: matrix products, memory, links, attention on the CPU."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexgen_helm.machine.disk_rate import disk_rates
from flexgen_helm.machine.matmul import faster_matmul, product_by

MEASURED_SECONDS = 0.3
ROUND_SECONDS = 0.005
READ_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""By type of device: many times as many as its caches hold, so that memory is what is measured."""
RANDOM_NUMBERS = 2**22
"""Different random numbers in a tensor that is measured."""
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


def measure_rates(
    device: torch.device,
    dtype: torch.dtype,
    *,
    matrix: tuple[int, int],
    row_tokens: tuple[int, int],
    used: Collection[str],
    folder: Path | None,
) -> Rates:
    """Measure what a run used, each for a fraction of a second, by the threads of this process; all but the disk only once.

    Args:
        device: Where the matrices were multiplied.
        dtype: Of the weights.
        matrix: Outputs and inputs of the matrix whose products are measured.
        row_tokens: Tokens of a prefill row and of a decode row.
        used: Resources that moved bytes, and "cpu_attention" if the CPU attended.
        folder: On the disk; None where the run used none.

    Raises:
        FlexGenError: If the disk cannot be measured.
    """
    rates = {
        "prefill": product_rate(device, dtype, row_tokens[0], matrix),
        "decode": product_rate(device, dtype, row_tokens[1], matrix),
        "read": read_rate(device),
    }
    if {"host_to_device", "device_to_host"} & set(used):
        rates["host_to_device"], rates["device_to_host"] = link_rates(device)
    if folder is not None and {"disk_read", "disk_write"} & set(used):
        rates["disk_read"], rates["disk_write"] = disk_rates(folder)
    if "cpu_attention" in used:
        rates["cpu_attention"] = cpu_attention_rate(dtype)
    return Rates(**rates)


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype, num_tokens: int, matrix: tuple[int, int]) -> float:
    """Floating-point operations per second of ``num_tokens`` tokens meeting one matrix, by the library of an engine."""
    product = product_by(faster_matmul(device, dtype))
    with torch.inference_mode():
        x, weight = random_numbers((num_tokens, matrix[1]), device, dtype), random_numbers(matrix, device, dtype)
        return per_second(lambda: product(x, weight, None), device) * 2 * num_tokens * matrix[0] * matrix[1]


@functools.cache
def read_rate(device: torch.device) -> float:
    """Bytes per second read from memory."""
    memory = much_memory(device)
    return per_second(lambda: memory.sum(), device) * memory.nbytes


@functools.cache
def link_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second copied to the device and back, from and to pinned memory."""
    there = much_memory(device)
    host = torch.empty_like(there, device="cpu", pin_memory=device.type == "cuda").copy_(there)  # no first touch is measured
    to_host = per_second(lambda: host.copy_(there, non_blocking=True), device)
    to_device = per_second(lambda: there.copy_(host, non_blocking=True), device)
    return to_device * there.nbytes, to_host * there.nbytes


@functools.cache
def cpu_attention_rate(dtype: torch.dtype) -> float:
    """Bytes of K and V per second that PyTorch's own attention reads on the CPU, with one query for each K or four."""
    keys, values = torch.zeros(2, NUM_CACHES, NUM_KV_HEADS, NUM_KEYS, HEAD_DIM, dtype=dtype).unbind()
    rates = []
    for num_queries in (1, 4):
        queries = torch.zeros(NUM_CACHES, NUM_KV_HEADS, num_queries, HEAD_DIM, dtype=dtype)
        with torch.inference_mode():
            attend = functools.partial(scaled_dot_product_attention, queries, keys, values)
            rates.append(per_second(attend, torch.device("cpu")))
    return max(rates) * 2 * keys.numel() * keys.element_size()


def much_memory(device: torch.device) -> Tensor:
    """Random fp32 numbers of `READ_BYTES`; on a GPU on which an engine has left less, of a half, a quarter and so on."""
    num_bytes = READ_BYTES[device.type]
    while True:
        try:
            return random_numbers((num_bytes // 4,), device, torch.float32)
        except torch.OutOfMemoryError:
            if num_bytes <= READ_BYTES["cpu"]:
                raise
            num_bytes //= 2


def random_numbers(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal numbers: a GPU that multiplies or moves equal ones needs less power, and clocks higher than in a run."""
    count = math.prod(shape)
    different = torch.randn(min(count, RANDOM_NUMBERS), generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    return different.repeat(-(-count // len(different)))[:count].view(shape)


def per_second(work: Callable[[], object], device: torch.device) -> float:
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

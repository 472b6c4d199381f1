"""Measure this machine's rates with our own kernels and formats, for the planner.

Raw rates come from `flexgen_helm.machine.raw_rates`, times of a real model's layers from `flexgen_helm.rows.layer_times`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.machine.identity import environment
from flexgen_helm.machine.profile import AttentionRate, MachineProfile, ProductRate, UnpackRate
from flexgen_helm.machine.raw_rates import disk_read_write, link_rates, memory_rate
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.usage import free_disk_bytes, total_bytes
from flexgen_helm.policy.measure_attention import Heads, decode_rate, prefill_rates
from flexgen_helm.policy.measure_operations import operation_seconds
from flexgen_helm.policy.measure_products import STANDARD_SHAPES, Shape, product_rates
from flexgen_helm.policy.measure_unpack import unpack_rates
from flexgen_helm.policy.model_shapes import sparse_name

Say = Callable[[str], None]
"""Told what is measured next, a line at a time."""
STANDARD_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
"""By type of device: dtypes that are measured where no model is named."""
STANDARD_TOKENS = {"cpu": (16, 64, 512), "cuda": (16, 64, 256, 1024, 4096)}
"""By type of device: tokens that meet a matrix."""
PREFILL_TOKENS = {"cpu": 64, "cuda": 1024}
"""By type of device: tokens of the row whose attention is measured."""
SEALED = CacheFormat(4, 4)
"""Format of compressed K and V that is measured, `kv4`."""
SPARSE, SPARSE_SEALED = CacheFormat(sparsity=10), CacheFormat(4, 4, sparsity=10)
"""Formats of sparse attention that are measured, `s10` and `kv4s10`."""


@dataclass(frozen=True)
class LayerShapes:
    """Sizes of a model's layer.

    Attributes:
        matrices: By which a token is multiplied.
        heads: Of its attention.
        tokens: Numbers of tokens that meet a matrix.
    """

    matrices: Sequence[Shape]
    heads: Heads
    tokens: Sequence[int]


def measure_machine(device: Device, folder: Path, say: Say) -> MachineProfile:
    """Measure everything that no model is needed for.

    Args:
        device: The device that computes.
        folder: Existing folder on the disk.
        say: Told what is measured.

    Raises:
        FlexGenError: If the disk cannot be measured.
    """
    where = device.torch_device
    say("memory")
    on_device = memory_rate(where)
    found: dict[str, Any] = {"device_read": on_device, "host_read": on_device}
    if device.own_memory:
        found["host_read"] = memory_rate(CPU.torch_device)
        say("link between host and device")
        link = link_rates(where)
        found |= {"host_to_device": link.to_device, "device_to_host": link.to_host, "duplex": link.duplex}
    say(f"disk of {folder}")
    found["disk_read"], found["disk_write"] = disk_read_write(folder)
    say("operations")
    operation = operation_seconds(device)
    ram = total_bytes(CPU.torch_device)
    machine = environment(where)
    profile = MachineProfile(
        name=machine["processor"] if not device.is_gpu else machine["device"],
        date=datetime.now(UTC).date().isoformat(),
        source="measured",
        device=machine["device"],
        own_memory=device.own_memory,
        is_gpu=device.is_gpu,
        threads=torch.get_num_threads(),
        memory={"device": total_bytes(where), "host": ram, "disk": free_disk_bytes(folder)},
        operation_seconds=median(operation.wall),
        processor_operation_seconds=median(operation.processor) if operation.processor else 0.0,
        **found,
    )
    shapes = LayerShapes(STANDARD_SHAPES, Heads(), STANDARD_TOKENS[where.type])
    parts = [measure_dtype(device, dtype, shapes, say) for dtype in STANDARD_DTYPES[where.type]]
    return replace(
        profile,
        products=tuple(rate for products, _ in parts for rate in products),
        attention=tuple(rate for _, attention in parts for rate in attention) + _sealed_rates(device, shapes, say),
        unpack=tuple(rate for dtype in STANDARD_DTYPES[where.type] for rate in measure_unpacking(device, dtype, say)),
    )


def measure_model(profile: MachineProfile, device: Device, dtype: torch.dtype, shapes: LayerShapes, say: Say) -> MachineProfile:
    """Return a profile with products and attention at a model's own sizes in place of the standard ones."""
    products, attention = measure_dtype(device, dtype, shapes, say)
    name = str(dtype).removeprefix("torch.")
    unpack = profile.unpack if any(rate.dtype == name for rate in profile.unpack) else measure_unpacking(device, dtype, say)
    return replace(profile, products=products, attention=attention + _sealed_rates(device, shapes, say), unpack=unpack)


def measure_dtype(
    device: Device, dtype: torch.dtype, shapes: LayerShapes, say: Say
) -> tuple[tuple[ProductRate, ...], tuple[AttentionRate, ...]]:
    """Measure matrix products and attention in a dtype."""
    where, name = device.torch_device, str(dtype).removeprefix("torch.")
    say(f"matrix products in {name}")
    products = tuple(product_rates(where, dtype, shapes.matrices, shapes.tokens))
    say(f"attention in {name}")
    return products, tuple(_attention_rates(device, name, (dtype, (PLAIN_CACHE, SPARSE)), shapes.heads))


def measure_unpacking(device: Device, dtype: torch.dtype, say: Say) -> tuple[UnpackRate, ...]:
    """Measure how fast weights are unpacked to a dtype."""
    say(f"unpacking to {str(dtype).removeprefix('torch.')}")
    return tuple(unpack_rates(device, dtype))


def _sealed_rates(device: Device, shapes: LayerShapes, say: Say) -> tuple[AttentionRate, ...]:
    say(f"attention over {SEALED.name}")
    return tuple(_attention_rates(device, SEALED.name, (torch.bfloat16, (SEALED, SPARSE_SEALED)), shapes.heads))


def _attention_rates(
    device: Device, name: str, forms: tuple[torch.dtype, Sequence[CacheFormat]], heads: Heads
) -> Iterator[AttentionRate]:
    """Measure attention over some formats of the same bits, a dense one first.

    Args:
        device: The device.
        name: Name of their bits.
        forms: Dtype of exact pages, and the formats.
        heads: Heads.
    """
    dtype, formats = forms
    names = {sparse_name(name, each.sparsity): each for each in formats}
    yield from prefill_rates(device, names, dtype, PREFILL_TOKENS[device.torch_device.type], heads)
    for full, each in names.items():
        for place in _places(device):
            yield decode_rate(place, device, full, (dtype, each), heads)


def _places(device: Device) -> tuple[Any, ...]:
    """Return where decode rows may attend."""
    return ("device", "host") if device.own_memory else ("device",)

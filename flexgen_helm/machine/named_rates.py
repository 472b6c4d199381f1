"""Everything that a profile says by name, to show it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from flexgen_helm.machine.profile import MachineProfile, Rate


class NamedRate(NamedTuple):
    """A rate or a time of a profile.

    Attributes:
        name: What it is of, unique within a profile.
        unit: "B/s", "FLOP/s" or "s".
        rate: Median and spread.
    """

    name: str
    unit: str
    rate: Rate


def named_rates(profile: MachineProfile) -> Iterator[NamedRate]:
    """Yield everything that was measured, raw rates first."""
    raw = {
        "device memory, read": profile.device_read,
        "host memory, read": profile.host_read,
        "link to the device": profile.host_to_device,
        "link to the host": profile.device_to_host,
        "disk, direct read": profile.disk_read,
        "disk, direct write": profile.disk_write,
    }
    yield from (NamedRate(name, "B/s", rate) for name, rate in raw.items() if rate is not None)
    for product in profile.products:
        packed = ", packed" if product.packed else ""
        yield NamedRate(f"products, {product.dtype}, {product.tokens} tokens{packed}", "FLOP/s", product.rate)
    for attention in profile.attention:
        unit = "FLOP/s" if attention.kind == "prefill" else "B/s"
        kernel = f", by {attention.kernel}" if attention.kernel else ""
        yield NamedRate(f"{attention.kind} attention, {attention.format}, {attention.place}{kernel}", unit, attention.rate)
    for unpack in profile.unpack:
        target = f" to {unpack.dtype}" if unpack.dtype else ""
        yield NamedRate(f"unpacking {unpack.format}{target}, {unpack.place}", "B/s", unpack.rate)
    for kind, seconds in profile.call_seconds.items():
        rate = Rate(seconds, processor=profile.processor_call_seconds.get(kind, 0.0))
        yield NamedRate(f"fixed time of a layer call, {kind} row", "s", rate)
    operation = Rate(profile.operation_seconds, processor=profile.processor_operation_seconds)
    yield NamedRate("fixed time of another operation", "s", operation)
    for layer in profile.layers:
        packed = ", packed" * layer.packed + ", compiled" * layer.compiled
        name = f"layer {layer.model}, {layer.dtype}, {layer.kind} row of {layer.tokens}{packed}"
        processor = layer.processor.seconds if layer.processor is not None else 0.0
        yield NamedRate(name, "s", Rate(layer.seconds, layer.spread, processor))

"""The rates that decide how long a policy takes, measured right before and right after each of its runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from flexgen_helm.loading.source import ModelSource
from flexgen_helm.machine.profile import LayerTime, MachineProfile, ProcessorSeconds, Rate, UnpackRate
from flexgen_helm.machine.raw_rates import disk_read_write, link_rates
from flexgen_helm.memory.device import Device
from flexgen_helm.policy.measure_unpack import FORMATS, LOSSLESS, unpack_rates
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.rows.layer_times import FORMS, layer_times
from flexgen_helm.runtime.planning.machine_profile import Subject, dummy_layers
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS

LAYER_SECONDS = 2.0
"""Layers are measured again and again for so long."""


@dataclass(frozen=True)
class Bench:
    """Where runs are measured.

    Attributes:
        device: The device.
        source: The model.
        folder: Folder on the disk.
        base: Profile of the machine, from which rates that are not measured again are taken.
    """

    device: Device
    source: ModelSource
    folder: Path
    base: MachineProfile

    def profile(self, plan: MemoryPlan, used: Sequence[str]) -> MachineProfile:
        """Return the profile with what a run needs most measured now: layers of its rows, unpacking, the disk, the link.

        Args:
            plan: Plan of the run.
            used: Resources that the run uses.
        """
        device, source = self.device, self.source
        with device.current(), PRECISE_PRODUCTS.hold():
            found: dict[str, Any] = {"layers": tuple(self._layers(plan))}
            if "unpack" in used:
                again = list(unpack_rates(device, source.dtype, [measured_form(plan.shapes.weight_format)]))
                done = {(each.place, each.format, each.dtype) for each in again}
                kept = [each for each in self.base.unpack if (each.place, each.format, each.dtype) not in done]
                found["unpack"] = (*kept, *again)
            if "disk_read" in used or "disk_write" in used:
                found["disk_read"], found["disk_write"] = disk_read_write(self.folder)
            if device.own_memory:
                link = link_rates(device.torch_device)
                found |= {"host_to_device": link.to_device, "device_to_host": link.to_host, "duplex": link.duplex}
        return replace(self.base, **found)

    def _layers(self, plan: MemoryPlan) -> list[LayerTime]:
        """Return the mean of several measurements: rates move within a second."""
        source, device, policy = self.source, self.device, plan.policy
        name = Subject(source, policy).signature
        forms = [form for form in FORMS if form.is_mapped == bool(plan.weights.streamed)]
        found, stop = list[list[LayerTime]](), time.perf_counter() + LAYER_SECONDS
        while not found or time.perf_counter() < stop:
            found.append(list(layer_times(dummy_layers(source, device, name), policy, device, forms=forms)))
        return [_mean_layer(alike) for alike in zip(*found, strict=True)]


def measured_form(form: str) -> str:
    """Return the measured format whose rate a format of weights has: the longest that its name begins with."""
    return max((name for name in (*FORMATS, LOSSLESS) if form == name or form.startswith(f"{name}-")), key=len)


def middle(before: MachineProfile, after: MachineProfile) -> MachineProfile:
    """Return a profile with the mean of two whose same rates were measured."""
    rates: dict[str, Any] = {
        name: _mean_rate(one, other)
        for name in ("disk_read", "disk_write", "host_to_device", "device_to_host")
        if (one := getattr(before, name)) and (other := getattr(after, name))
    }
    return replace(
        before,
        layers=tuple(map(_mean_layer, zip(before.layers, after.layers, strict=True))),
        unpack=tuple(map(_mean_unpack, before.unpack, after.unpack)),
        **rates,
    )


def difference(before: MachineProfile, after: MachineProfile, resource: str) -> float:
    """Return by how much the rates of a resource differ, over the smaller one: the most of them."""
    if resource == "unpack":
        pairs = [(a.rate.value, b.rate.value) for a, b in zip(before.unpack, after.unpack, strict=True)]
    elif resource in ("device", "cpu_attention"):
        pairs = [(a.seconds, b.seconds) for a, b in zip(before.layers, after.layers, strict=True)]
    else:
        pairs = [(getattr(before, resource).value, getattr(after, resource).value)]
    return max((max(pair) / min(pair) - 1 for pair in pairs), default=0.0)


def sharing(profile: MachineProfile) -> float:
    """Return the part by which layers take longer than their processor time: others work on the machine. 0 on a GPU."""
    pairs = [(each.seconds, each.processor.seconds) for each in profile.layers if each.processor]
    return max((seconds / processor - 1 for seconds, processor in pairs), default=0.0)


def _mean_rate(one: Rate, other: Rate) -> Rate:
    return replace(one, value=_harmonic(one.value, other.value), processor=_harmonic(one.processor, other.processor))


def _mean_unpack(one: UnpackRate, other: UnpackRate) -> UnpackRate:
    return replace(one, rate=_mean_rate(one.rate, other.rate))


def _mean_layer(alike: Sequence[LayerTime]) -> LayerTime:
    processor = None
    if all(each.processor for each in alike):
        times = [astuple(each.processor) for each in alike if each.processor]
        processor = ProcessorSeconds(*(mean(part) for part in zip(*times, strict=True)))
    return replace(
        alike[0],
        seconds=mean(each.seconds for each in alike),
        next_seconds=mean(each.next_seconds for each in alike),
        record_seconds=mean(each.record_seconds for each in alike),
        processor=processor,
    )


def _harmonic(one: float, other: float) -> float:
    """Return the rate whose time is the mean of both rates' times."""
    return 2 / (1 / one + 1 / other) if one and other else 0.0

"""A quantised model whose slabs are in a folder: placed on their tiers as they are, or unpacked once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.slab import Binding, SlabFormat
from flexgen_helm.memory.weight_store import Unit, WeightStore
from flexgen_helm.model.embeddings import keep_on_host
from flexgen_helm.model.layers import layers_of
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy.model_shapes import EMBEDDINGS
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.runtime.fitting.fit import FittedModel
from flexgen_helm.schedule.operations import head_unit


def unpack_all(fitted: FittedModel, model: PreTrainedModel, device: Device, only: range | None = None) -> None:
    """Unpack every layer into memory of its own, and close the folder of slabs.

    Args:
        fitted: The quantised model.
        model: The model without its layers' weights, which it gets.
        device: The device that computes.
        only: Layers that are unpacked; None: all.
    """
    layers = layers_of(model)
    try:
        for j in only or range(len(layers)):
            form = fitted.formats[j]
            bound = torch.empty(form.bound.num_bytes, dtype=torch.uint8, device=device.torch_device)
            if device.own_memory:
                form.unpack(_carried(form, _read(fitted, j)).to(device.torch_device), bound)
            else:
                form.load(_read(fitted, j), bound)
            Binding(layers[j], form.bound).bind(bound)
    finally:
        fitted.slabs.close()


def packed_store(fitted: FittedModel, plan: WeightPlan, model: RecordedModel, device: Device, meter: Meter) -> WeightStore:
    """Put slabs on the tiers of a plan, and return the store that unpacks them when they are needed.

    Args:
        fitted: The quantised model.
        plan: Plan with the tier of each unit.
        model: The model without its layers' weights.
        device: The device that computes.
        meter: Measures the transfers.
    """
    if plan.own_memory and plan.tiers[EMBEDDINGS] == "host":
        keep_on_host(model.model, device.torch_device)
    modules = dict(enumerate(model.layers))
    head = head_unit(len(modules))
    if head in plan.streamed:
        modules[head] = model.model.get_output_embeddings()
    units = {}
    for j in plan.streamed:
        form, memory = fitted.formats[j], None
        binding = Binding(modules[j], form.bound)
        binding.to_meta()
        on_device = device.own_memory and plan.tiers[j] == "device"
        if on_device:
            memory = _carried(form, _read(fitted, j)).to(device.torch_device)
        elif plan.tiers[j] != "disk":
            memory = _read(fitted, j, pin=device.is_gpu and not form.is_coded)
        units[j] = Unit(binding, form, memory, on_device)
    return WeightStore(units, device=device, num_slots=plan.num_slots, source=fitted.slabs, meter=meter)


def _carried(form: SlabFormat, stored: Tensor) -> Tensor:
    """Return the carried slab for a stored one, both on the CPU."""
    if not form.is_coded:
        return stored
    carried = allocate(form.carried.num_bytes)
    form.decode(stored, carried)
    return carried


def _read(fitted: FittedModel, j: int, *, pin: bool = False) -> Tensor:
    memory = allocate(fitted.formats[j].stored.num_bytes, pin=pin)
    fitted.slabs.read(j, memory).result()
    return memory

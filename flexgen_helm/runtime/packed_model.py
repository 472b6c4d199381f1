"""A quantised model whose slabs are in a folder: placed on their tiers as they are, or unpacked once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.slab import Binding
from flexgen_helm.memory.weight_store import Unit, WeightStore
from flexgen_helm.model.embeddings import keep_on_host
from flexgen_helm.model.layers import layers_of
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy.model_shapes import EMBEDDINGS
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.runtime.fitting.fit import FittedModel
from flexgen_helm.schedule.operations import head_unit


def unpack_all(fitted: FittedModel, model: PreTrainedModel, device: Device) -> None:
    """Unpack every layer into memory of its own, and close the folder of slabs.

    Args:
        fitted: The quantised model.
        model: The model without its layers' weights, which it gets.
        device: The device that computes.
    """
    try:
        for j, layer in enumerate(layers_of(model)):
            form = fitted.formats[j]
            bound = torch.empty(form.bound.num_bytes, dtype=torch.uint8, device=device.torch_device)
            form.unpack(_read(fitted, j).to(device.torch_device), bound)
            Binding(layer, form.bound).bind(bound)
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
        binding, memory = Binding(modules[j], fitted.formats[j].bound), None
        binding.to_meta()
        if plan.tiers[j] != "disk":
            memory = _read(fitted, j, pin=device.is_gpu and plan.tiers[j] == "host")
            memory = memory.to(device.torch_device) if plan.tiers[j] == "device" else memory
        units[j] = Unit(binding, fitted.formats[j], memory)
    return WeightStore(units, device=device, num_slots=plan.num_slots, source=fitted.slabs, meter=meter)


def _read(fitted: FittedModel, j: int, *, pin: bool = False) -> Tensor:
    memory = allocate(fitted.formats[j].stored.num_bytes, pin=pin)
    fitted.slabs.read(j, memory).result()
    return memory

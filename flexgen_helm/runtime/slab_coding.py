"""How slabs on disk are coded: as the user says, as those are that are there, or as makes sweeps shorter on this machine."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from flexgen_helm.compression.lossless import CODED_BITS
from flexgen_helm.compression.lossless_slab import encode_slab
from flexgen_helm.errors import PolicyError
from flexgen_helm.loading.source import dtype_name
from flexgen_helm.machine.disk_rate import disk_rates
from flexgen_helm.machine.rates import per_second, product_rate, random_numbers
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.slab import SlabLayout, SlabTensor
from flexgen_helm.model.layers import layers_of
from flexgen_helm.policy.roofline import LEAST_WIDTH, layer_sizes
from flexgen_helm.policy.shapes_of_model import setting
from flexgen_helm.policy.slab_coding import SlabCosts, is_worth_coding
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.runtime.free_space import make_folder
from flexgen_helm.runtime.slab_places import SlabPlaces
from flexgen_helm.types import ResolvedPolicy, SlabCoding

logger = logging.getLogger(__name__)

LEAST_BYTES = 2**30
"""Bytes of slabs from which on it is measured whether coding pays; fewer are read in no time."""
MEASURED_NUMBERS = 2**23
"""Numbers that are decoded to measure how fast that is: more than caches hold."""


def require_codable(coding: str, dtype: torch.dtype, *, compressed: bool) -> None:
    """Check that slabs can be coded as a policy says.

    Raises:
        PolicyError: If they cannot.
    """
    if coding != "lossless":
        return
    if compressed:
        raise PolicyError(
            "slab_coding is 'lossless', but slabs of a compressed variant have a form of their own. Leave it out of the policy."
        )
    if dtype not in CODED_BITS:
        raise PolicyError(
            f"slab_coding is 'lossless', but weights in {dtype_name(dtype)} cannot be coded without loss, only those in "
            "bfloat16 and float16. Choose one of these as dtype, which changes results, or leave slab_coding out of the policy."
        )


def automatic_coding(
    whole: PreTrainedModel, plan: WeightPlan, policy: ResolvedPolicy, device: Device, places: SlabPlaces
) -> SlabCoding:
    """Decide whether the slabs of a plan are coded without loss, and say why in a line of the log.

    Args:
        whole: The model on the meta device.
        plan: Plan of weights with plain slabs.
        policy: Policy whose coding is "auto".
        device: The device that computes.
        places: Where slabs are or will be.

    Raises:
        FlexGenError: If the disk cannot be measured.
    """
    found, size = places.found(), sum(plan.shapes.disk_bytes[j] for j in plan.on_disk)
    if not size or whole.dtype != torch.bfloat16:  # float16 shrinks by a seventh only
        return "plain"
    if len(found) == 1:
        logger.info("slabs on disk are %s, since %s holds such; `slab_coding` names another", found[0], places.folder(found[0]))
        return found[0]
    if size < LEAST_BYTES:
        logger.info("slabs on disk are plain, since they have less than %s; `slab_coding` names another", gib(LEAST_BYTES))
        return "plain"
    make_folder(places.folder("plain"))
    costs = SlabCosts(
        plain_bytes=size,
        coded_bytes=size * CODED_BITS[whole.dtype] / 16,
        disk_rate=disk_rates(places.folder("plain"))[0],
        num_weights=size / whole.dtype.itemsize,
        decoding_rate=decoding_rate(whole.dtype),
        computing_seconds=0.0 if device.own_memory else _computing_seconds(whole, policy, device),
    )
    chosen: SlabCoding = "lossless" if is_worth_coding(costs) else "plain"
    logger.info(
        "slabs on disk are %s: a sweep takes about %.1f s with lossless ones and %.1f s with plain ones (the disk reads %.2f "
        "GB/s, %s threads decode %.2f G weights/s and compute for %.1f s); `slab_coding` names another",
        chosen,
        costs.coded_seconds,
        costs.plain_seconds,
        costs.disk_rate / 1e9,
        torch.get_num_threads(),
        costs.decoding_rate / 1e9,
        costs.computing_seconds,
    )
    return chosen


def decoding_rate(dtype: torch.dtype) -> float:
    """Measure the weights per second that all threads of this process decode together."""
    layout = SlabLayout((SlabTensor(("weight",), dtype, (MEASURED_NUMBERS,), 0),), MEASURED_NUMBERS * dtype.itemsize)
    bound = allocate(layout.num_bytes)
    layout.tensors[0].view(bound).copy_(random_numbers((MEASURED_NUMBERS,), CPU.torch_device, dtype))
    stored, form = encode_slab(bound, layout, dtype)
    form.decode(stored, bound)  # compiles
    return per_second(lambda: form.decode(stored, bound), CPU.torch_device) * MEASURED_NUMBERS


def _computing_seconds(whole: PreTrainedModel, policy: ResolvedPolicy, device: Device) -> float:
    """Return the seconds that a sweep computes in which a block decodes and no prompt is read.

    No sweep of a full block computes less, so that a plain choice is never wrong by what prompts add.
    """
    sizes = layer_sizes(layers_of(whole), setting(whole, "num_experts_per_tok"))
    weights, widest = (sizes.active_weights, sizes.widest) if sizes else (whole.num_parameters(), (LEAST_WIDTH, LEAST_WIDTH))
    rate = product_rate(device.torch_device, whole.dtype, policy.gpu_batch_size, widest)
    return 2 * weights * policy.block_size / rate

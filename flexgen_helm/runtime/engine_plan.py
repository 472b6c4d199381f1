"""The plan of an engine: formats of slabs, policy and memory, decided before weights are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from flexgen_helm.errors import PolicyError
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.memory.slab import SlabFormat
from flexgen_helm.policy.attention_place import attention_place
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.policy.space import Space
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.runtime.fitting.fit import FittedModel
from flexgen_helm.runtime.free_space import measure_space, whole_machine
from flexgen_helm.runtime.planning.automatic import Automatic, automatic_policy
from flexgen_helm.runtime.planning.stage_layers import stage_layers
from flexgen_helm.runtime.slab_coding import automatic_coding
from flexgen_helm.runtime.slab_places import SlabPlaces
from flexgen_helm.types import ResolvedPolicy, SlabCoding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EnginePlan:
    """What is decided before weights are read.

    Attributes:
        formats: Slab formats of the layers, and of the output head if it has weights of its own.
        policy: Policy with the place of attention and the coding of slabs.
        memory: Plan of memory.
        automatic: What the search for the workload found; None: nothing was searched.
        layers: Layers of this stage of a pipeline, whose units `memory` numbers from 0; None: all.
    """

    formats: Mapping[int, SlabFormat]
    policy: ResolvedPolicy
    memory: MemoryPlan
    automatic: Automatic | None = None
    layers: range | None = None


def plan_engine(
    source: ModelSource, options: EngineOptions, kv_dtype: torch.dtype, places: SlabPlaces, fitted: FittedModel | None
) -> EnginePlan:
    """Plan an engine.

    Args:
        source: The model.
        options: Options of the user.
        kv_dtype: Dtype in which K and V are stored.
        places: Folders of slabs.
        fitted: The quantised model; None: weights are not compressed.

    Raises:
        PolicyError: If the plan needs more memory than may be used, or the policy asks for something impossible.
    """
    whole = source.empty
    formats: Mapping[int, SlabFormat] = plain_formats(whole)
    shapes = shapes_of(whole, formats, kv_dtype, options.cache_format)
    policy = _with_place(resolved(options.asked, options.device), shapes, options)
    space = measure_space(options.device, options.limits, places.folder("plain"))
    if options.stage is not None:
        policy = replace(policy, num_lanes=options.stage.num_lanes(policy))
    layers = stage_layers(source, shapes, policy, space, options)
    if fitted is None and policy.keep_packed:
        raise PolicyError("keep_packed is for compressed weights. Name a variant, such as @w4, or leave it out.")
    if fitted is not None:
        if not policy.keep_packed and _fits_unpacked(_part(shapes, layers), policy, space):
            logger.info("weights are unpacked once, since the unpacked model fits on the device")
        else:
            assert options.compression is not None
            formats, scheme = fitted.formats, options.compression.weight_scheme
            shapes = shapes_of(whole, formats, kv_dtype, options.cache_format, weight_format=scheme)
    if layers is not None:
        policy = replace(policy, slab_coding="plain")
        return EnginePlan(formats, policy, MemoryPlan.of(_part(shapes, layers), policy, space, options.asked), layers=layers)
    stored = _coded(shapes, places) if policy.slab_coding == "lossless" else shapes
    automatic = automatic_policy(source, stored, policy, space, options)
    if automatic is not None:
        policy = replace(automatic.choice.policy, slab_coding=policy.slab_coding)
    if fitted is None and policy.slab_coding != "plain":
        return replace(_coded_plan(whole, options, shapes, policy, places), automatic=automatic)
    policy = replace(policy, slab_coding="plain")
    return EnginePlan(formats, policy, MemoryPlan.of(shapes, policy, space, options.asked), automatic)


def _coded_plan(
    whole: PreTrainedModel, options: EngineOptions, shapes: ModelShapes, policy: ResolvedPolicy, places: SlabPlaces
) -> EnginePlan:
    """Decide how slabs are coded. Coded ones need slots beside the buffers into which they are read."""

    def planned(coding: SlabCoding) -> EnginePlan:
        space = measure_space(options.device, options.limits, places.folder(coding))
        sizes = _coded(shapes, places) if coding == "lossless" else shapes
        memory = MemoryPlan.of(sizes, policy, space, options.asked)
        return EnginePlan(plain_formats(whole), replace(policy, slab_coding=coding), memory)

    if policy.slab_coding == "lossless":
        return planned("lossless")
    plain = planned("plain")
    if automatic_coding(whole, plain.memory.weights, policy, options.device, places) == "plain":
        return plain
    try:
        return planned("lossless")
    except PolicyError:
        logger.info("slabs on disk are plain, since there is no memory to decode them")
        return plain


def _coded(shapes: ModelShapes, places: SlabPlaces) -> ModelShapes:
    """Return the sizes of a model whose slabs on disk are coded without loss."""
    return replace(shapes, is_coded=True, disk_bytes={**shapes.disk_bytes, **places.coded_bytes()}, weight_format="lossless")


def _part(shapes: ModelShapes, layers: range | None) -> ModelShapes:
    """Return the sizes of some layers; None: of the whole model."""
    return shapes if layers is None else shapes.of_layers(layers)


def _fits_unpacked(shapes: ModelShapes, policy: ResolvedPolicy, space: Space) -> bool:
    """Whether the unpacked model is resident where the policy puts it."""
    try:
        return MemoryPlan.of(shapes, policy, space).weights.is_resident
    except PolicyError:
        return False


def _with_place(policy: ResolvedPolicy, shapes: ModelShapes, options: EngineOptions) -> ResolvedPolicy:
    """Decide where decode rows attend and where K and V are, if the device has a memory of its own."""
    if not options.device.own_memory:
        return policy
    asked = options.asked
    if options.cache_format.flexgen:
        if asked.cpu_attention:
            raise PolicyError(
                "K and V by FlexGen's rules (`-flexgen`) are attended to on the device only. Leave cpu_attention out, or give "
                "0, or name the variant without `-flexgen`."
            )
        asked = replace(asked, cpu_attention=0.0)
    machine = whole_machine(options.device, options.limits)
    place = attention_place(asked, policy, shapes, machine)
    if place.reason is not None:
        where = "on the CPU" if place.cpu_attention else "on the device"
        logger.info("packed rows that decode attend %s: %s; `cpu_attention` names another place", where, place.reason)
    return replace(policy, cpu_attention=place.cpu_attention, cache=place.cache)

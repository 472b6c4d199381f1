"""Loading: checks a model, and loads its units to the tiers of the plan."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flexgen_helm.loading.source import LoadedModel, ModelSource, dtype_name
from flexgen_helm.memory.allocator import return_freed_memory
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.slab import SlabFormat
from flexgen_helm.memory.weight_store import WeightStore
from flexgen_helm.model.compiled.layers import CompiledLayers
from flexgen_helm.model.layers import layer_kinds, layers_of, refuse_shared_layers
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.policy.shapes_of_model import own_head
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.rows.choice import CheckedModel, KindChoice, Passed, check_model
from flexgen_helm.runtime.fitting.fit import FittedModel
from flexgen_helm.runtime.fitting.packing import PackedLayers
from flexgen_helm.runtime.offload import Offloader
from flexgen_helm.runtime.packed_model import packed_store, unpack_all
from flexgen_helm.runtime.pipeline.stage import refuse_shared_kv
from flexgen_helm.runtime.planning.automatic import Automatic
from flexgen_helm.runtime.slab_places import slab_identity
from flexgen_helm.runtime.verdicts import Check, recall, remember
from flexgen_helm.types import ResolvedPolicy, SlabCoding, WeightNumerics

logger = logging.getLogger(__name__)

LARGE_BYTES = 2 * 2**30
"""Bytes of weights. Larger models are checked on their first layers before all are read, so that a refusal takes seconds."""


@dataclass(frozen=True)
class Blueprint:
    """Everything about an engine that is decided before weights are read."""

    source: ModelSource
    whole: PreTrainedModel
    """The model on the meta device."""
    device: Device
    policy: ResolvedPolicy
    rows: KindChoice
    """Kind of rows that the user asked for."""
    kv_dtype: torch.dtype
    """Dtype in which K and V are stored and attention reads them."""
    recheck: bool
    """Whether the self-check is repeated though an equal one passed before."""
    formats: Mapping[int, SlabFormat]
    """Slab formats of the layers and of an output head with weights of its own, by number."""
    plan: MemoryPlan
    weights: WeightNumerics
    """Identity of the slabs."""
    folder: Path
    """Folder for everything on disk; it may not exist."""
    meter: Meter
    fitted: FittedModel | None = None
    """The quantised model; None: weights are not compressed."""
    automatic: Automatic | None = None
    """What the search of a policy found; None: nothing was searched."""
    compiled: CompiledLayers | None = None
    """Compiles layers; None: they run as they are."""
    layers: range | None = None
    """Layers of this stage of a pipeline, whose units ``plan`` numbers from 0; None: all."""

    @property
    def placement(self) -> WeightPlan:
        """Tiers of the units by their numbers in the whole model."""
        if self.layers is None:
            return self.plan.weights
        return self.plan.weights.numbered_from(self.layers.start, len(layers_of(self.whole)))


@dataclass(frozen=True)
class PlacedModel:
    """A loaded and checked model whose weights are on their tiers."""

    loaded: LoadedModel
    checked: CheckedModel
    weights: WeightStore | None
    """Store that brings streamed weights to the device; None: all weights are resident."""
    disk_bytes: Mapping[int, int] = field(default_factory=dict)
    """Bytes of the slabs on disk by number, where they may differ from the plan's."""


def load_and_check(blueprint: Blueprint) -> PlacedModel:
    """Check a model and load its units to the tiers of the plan.

    Raises:
        UnsupportedModel: If the model would be computed wrongly, or its layers cannot be placed one by one.
        CorruptFile: If files are missing or torn.
        DiskFull: If there is no space for everything that the plan puts on disk.
    """
    source, weights = blueprint.source, blueprint.plan.weights
    if blueprint.layers is not None:
        refuse_shared_layers(blueprint.whole)
        refuse_shared_kv(blueprint.whole)
        logger.info("%s: layers %s", source.name, _described(blueprint))
        return _load_offloaded(blueprint, _check_first_layers(blueprint, blueprint.policy))
    if not weights.is_resident:
        refuse_shared_layers(blueprint.whole)
        logger.info("%s does not fit on the device: weights %s", source.name, weights.describe())
        return _load_offloaded(blueprint, _check_first_layers(blueprint, blueprint.policy))
    check = _check_of(blueprint, source, blueprint.policy, whole=True)
    passed, size = _recall(blueprint, check), blueprint.plan.shapes.total_bytes
    if size > LARGE_BYTES:
        if passed is None:
            _check_first_layers(blueprint, resolved(None, blueprint.device, few_requests=True))
        logger.info("%s fits on the device (%s): nothing is offloaded", source.name, gib(size))
    loaded = _load_resident(blueprint)
    if passed is not None:
        return PlacedModel(loaded, CheckedModel(RecordedModel(loaded.model, compiled=blueprint.compiled), passed), None)
    checked = check_model(loaded, blueprint.policy, blueprint.rows, source.first_layers, blueprint.compiled)
    remember(check, checked.passed)
    _free_what_is_left_of_checks()
    return PlacedModel(loaded, checked, None)


def _load_resident(blueprint: Blueprint) -> LoadedModel:
    """Load all weights to the device; quantised ones are unpacked there."""
    fitted = blueprint.fitted
    if fitted is None:
        return blueprint.source.load()
    loaded = blueprint.source.load(PackedLayers())
    unpack_all(fitted, loaded.model, blueprint.device)
    return loaded


def _check_of(blueprint: Blueprint, source: ModelSource, policy: ResolvedPolicy, *, whole: bool) -> Check:
    """Return the self-check of a model, or of its first layers, under a policy."""
    kv_dtype = dtype_name(blueprint.kv_dtype)
    return Check(
        blueprint.weights,
        policy,
        blueprint.rows,
        kv_dtype=kv_dtype,
        device=source.device,
        whole=whole,
        compiled=blueprint.compiled is not None,
    )


def _recall(blueprint: Blueprint, check: Check) -> Passed | None:
    return None if blueprint.recheck else recall(blueprint.source.name, check)


def _load_offloaded(blueprint: Blueprint, first: Passed) -> PlacedModel:
    """Load a model layer by layer to the tiers of the plan, after its first layers were checked."""
    kinds = layer_kinds(blueprint.whole, layers_of(blueprint.whole))
    if blueprint.layers is not None:
        kinds = kinds[blueprint.layers.start : blueprint.layers.stop]
    verdict = first.verdict.of_all_layers(kinds)
    if blueprint.fitted is not None:
        return _load_packed(blueprint, blueprint.fitted, replace(first, verdict=verdict))
    coding: SlabCoding = "lossless" if blueprint.policy.slab_coding == "lossless" else "plain"
    offloader = Offloader(
        blueprint.placement,
        blueprint.formats,
        device=blueprint.device,
        folder=blueprint.folder,
        identity=slab_identity(blueprint.weights, coding),
        coded=blueprint.source.dtype if coding == "lossless" else None,
    )
    try:
        loaded = blueprint.source.load(offloader)
        _drop_head(blueprint, loaded.model)
        model = RecordedModel(loaded.model, device=blueprint.device.torch_device, compiled=blueprint.compiled)
        store = offloader.store(loaded.model, model.layers, blueprint.meter)
    except BaseException:
        offloader.close()
        raise
    disk_bytes = offloader.disk_bytes if blueprint.layers is None else {}
    return PlacedModel(loaded, CheckedModel(model, replace(first, verdict=verdict)), store, disk_bytes)


def _load_packed(blueprint: Blueprint, fitted: FittedModel, passed: Passed) -> PlacedModel:
    """Put the slabs of a quantised model on the tiers of the plan."""
    try:
        loaded = blueprint.source.load(PackedLayers())
        _drop_head(blueprint, loaded.model)
        if blueprint.plan.weights.is_resident:
            unpack_all(fitted, loaded.model, blueprint.device, blueprint.layers)
        model = RecordedModel(loaded.model, device=blueprint.device.torch_device, compiled=blueprint.compiled)
        if blueprint.plan.weights.is_resident:
            return PlacedModel(loaded, CheckedModel(model, passed), None)
        store = packed_store(fitted, blueprint.placement, model, blueprint.device, blueprint.meter)
    except BaseException:
        fitted.slabs.close()
        raise
    return PlacedModel(loaded, CheckedModel(model, passed), store)


def _drop_head(blueprint: Blueprint, model: PreTrainedModel) -> None:
    """Free an output head with weights of its own on a stage that does not compute it."""
    head = None if blueprint.plan.shapes.has_head else own_head(model)
    if head is not None:
        head.to(device="meta")


def _described(blueprint: Blueprint) -> str:
    layers = blueprint.layers
    assert layers is not None
    return f"{layers.start} to {layers.stop - 1} on this stage, {blueprint.plan.weights.describe()}"


def _check_first_layers(blueprint: Blueprint, policy: ResolvedPolicy) -> Passed:
    """Check the first layers, so that a refusal takes seconds; they are read again with the whole model.

    Where the device has no room for them they are checked on the CPU, which tells nothing of the bits of another device.
    """
    source, plan = blueprint.source, blueprint.plan
    if blueprint.device.own_memory and plan.shapes.first_layers_bytes + plan.checking_bytes > plan.space.of("device"):
        logger.info("%s: the first layers are checked on the CPU, since the device has no room for their copy", source.name)
        source, policy = replace(source, device=CPU.torch_device), resolved(None, CPU, few_requests=True)
    check = _check_of(blueprint, source, policy, whole=False)
    passed = _recall(blueprint, check)
    if passed is None:
        passed = check_model(source.first_layers(), policy, blueprint.rows, compiled=blueprint.compiled).passed
        remember(check, passed)
        _free_what_is_left_of_checks()
    if source.device.type != blueprint.source.device.type:
        passed = replace(passed, verdict=replace(passed.verdict, bit_stable=None))
    return passed


def _free_what_is_left_of_checks() -> None:
    """Free the models and caches that checks made, which are in circles, so that no plan counts them as taken."""
    gc.collect()
    return_freed_memory()

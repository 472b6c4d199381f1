"""Loads a model to where its plan puts it, after the self-check of what a refusal needs."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from flexgen_helm.loading.source import LoadedModel, ModelSource
from flexgen_helm.memory.allocator import return_freed_memory
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.slab import Plain, SlabFormat
from flexgen_helm.memory.weight_store import WeightStore
from flexgen_helm.model.layers import layer_kinds, layers_of, refuse_shared_layers
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.policy.shapes_of_model import own_head
from flexgen_helm.rows.choice import CheckedModel, Kind, KindChoice, check_model
from flexgen_helm.rows.self_check import Verdict
from flexgen_helm.runtime.offload import Offloader
from flexgen_helm.types import ResolvedPolicy, WeightNumerics

logger = logging.getLogger(__name__)

LARGE_BYTES = 2 * 2**30
"""Larger models are checked on their first layers before the other layers are read: a refusal takes seconds."""


@dataclass(frozen=True)
class Blueprint:
    """Everything that is decided before a weight is read."""

    source: ModelSource
    whole: PreTrainedModel
    """The model on the meta device."""
    device: Device
    policy: ResolvedPolicy
    rows: KindChoice
    """Kind of rows that was asked for."""
    formats: Mapping[int, SlabFormat]
    """How layers and head are stored."""
    plan: MemoryPlan
    weights: WeightNumerics
    """Identity of the slabs."""
    folder: Path
    """For everything on disk; it may not exist."""
    meter: Meter


@dataclass(frozen=True)
class PlacedModel:
    """A model that is loaded, checked and placed."""

    loaded: LoadedModel
    checked: CheckedModel
    weights: WeightStore | None
    """Brings weights to the device; None: all of them stay there."""


def plain_formats(model: PreTrainedModel) -> dict[int, SlabFormat]:
    """Return the formats of layers and head of a model on the meta device, uncompressed."""
    units = [*layers_of(model), *filter(None, [own_head(model)])]
    return {j: Plain.of(unit) for j, unit in enumerate(units)}


def slab_identity(weights: WeightNumerics) -> dict[str, str]:
    """Return everything that the bytes of a model's slabs depend on; transformers names and fuses their tensors."""
    return {**asdict(weights), "transformers": transformers_version}


def load_and_check(blueprint: Blueprint) -> PlacedModel:
    """Load a model to where the plan puts it, and check it.

    Raises:
        UnsupportedModel: If the model would be computed wrongly, or its layers cannot be placed one by one.
        CorruptFile: If files are missing or torn.
        DiskFull: If there is no space for what the plan puts on disk.
    """
    source, weights = blueprint.source, blueprint.plan.weights
    if not weights.is_resident:
        refuse_shared_layers(blueprint.whole)
        logger.info("%s does not fit on the device: weights %s", source.name, weights.describe())
        return _load_offloaded(blueprint, _check_first_layers(blueprint, blueprint.policy))
    size = blueprint.plan.shapes.total_bytes
    if size > LARGE_BYTES:
        _check_first_layers(blueprint, resolved(None, blueprint.device, few_requests=True))
        logger.info("%s fits on the device (%s): nothing is offloaded", source.name, gib(size))
    loaded = source.load()
    return PlacedModel(loaded, check_model(loaded, blueprint.policy, blueprint.rows), None)


def _load_offloaded(blueprint: Blueprint, first: tuple[Kind, Verdict, str | None]) -> PlacedModel:
    """Load a model of which the first layers were checked, layer by layer, to where the plan puts them."""
    kind, verdict, not_packed = first
    verdict = verdict.of_all_layers(layer_kinds(blueprint.whole, layers_of(blueprint.whole)))
    offloader = Offloader(
        blueprint.plan.weights,
        blueprint.formats,
        device=blueprint.device,
        folder=blueprint.folder,
        identity=slab_identity(blueprint.weights),
    )
    try:
        loaded = blueprint.source.load(offloader)
        model = RecordedModel(loaded.model, device=blueprint.device.torch_device)
        store = offloader.store(loaded.model, model.layers, blueprint.meter)
    except BaseException:
        offloader.close()
        raise
    return PlacedModel(loaded, CheckedModel(kind, model, verdict, not_packed), store)


def _check_first_layers(blueprint: Blueprint, policy: ResolvedPolicy) -> tuple[Kind, Verdict, str | None]:
    """Check the first layers, which are read again with the whole model: so a refusal takes seconds."""
    source, plan = blueprint.source, blueprint.plan
    if blueprint.device.own_memory and plan.shapes.first_layers_bytes + plan.checking_bytes > plan.space.of("device"):
        logger.info("%s: the first layers are checked on the CPU, since the device has no room for their copy", source.name)
        source, policy = replace(source, device=CPU.torch_device), resolved(None, CPU, few_requests=True)
    checked = check_model(source.first_layers(), policy, blueprint.rows)
    found = checked.kind, checked.verdict, checked.not_packed
    del checked
    gc.collect()
    return_freed_memory()
    return found

"""From a model source to the parts of an engine: plan, check, load, place."""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers import __version__ as library_version

from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.errors import FlexGenError, PolicyError, UnsupportedModel
from flexgen_helm.loading.source import LoadedModel, ModelSource
from flexgen_helm.memory.allocator import return_freed_memory
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.device import CPU, Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.usage import free_bytes
from flexgen_helm.memory.weight_store import WeightStore
from flexgen_helm.model.layers import layer_kinds, layers_of
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy.memory_plan import plan_weights
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.policy.weight_plan import Space, WeightPlan
from flexgen_helm.rows.choice import ALTERNATIVE, CheckedModel, Kind, KindChoice, check_model, log_choice
from flexgen_helm.rows.self_check import Verdict
from flexgen_helm.runtime.offload import Offloader
from flexgen_helm.types import TIERS, ResolvedPolicy, Tier

logger = logging.getLogger(__name__)

LARGE_BYTES = 2 * 2**30
"""Larger models are checked on their first layers before the rest is read: a refusal takes seconds."""
PROCESS_BYTES = 128 * 2**20
"""Of threads, of the workspaces of libraries, and of what allocators do not give back."""


@dataclass(frozen=True)
class Placing:
    """What a user says of memory."""

    limits: Mapping[Tier, int]
    """Most bytes of the tiers that are named."""
    folder: Path | None = None
    """For what is on disk; None: under the cache folder."""


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    loaded: LoadedModel
    device: Device
    checked: CheckedModel
    policy: ResolvedPolicy
    """With the realised shares of weights."""
    plan: WeightPlan
    space: Space
    limits: Mapping[Tier, int]
    """What the user allows."""
    weights: WeightStore | None
    """What brings weights to the device; None: all of them stay there."""
    folder: Path
    """For what is on disk; it may not exist."""
    meter: Meter


def build(source: ModelSource, device: Device, policy: ResolvedPolicy, rows: KindChoice, placing: Placing) -> Parts:
    """Plan, check, load and place a model.

    Raises:
        UnsupportedModel: If the model would be computed wrongly, or its layers cannot be placed as the policy says.
        PolicyError: If the plan needs more memory than may be used.
        CorruptFile: If files are missing or torn.
        DiskFull: If there is no space for what the plan puts on disk.
    """
    whole = _empty(source)
    folder = placing.folder or cache_folder() / "offload" / f"{source.digest()}-{str(source.dtype).removeprefix('torch.')}"
    space = measure_space(device, placing, folder)
    plan = plan_weights(whole, policy, space)
    meter = Meter(device.torch_device)
    if plan.is_resident:
        loaded = _load_resident(source, plan, space, rows)
        checked, weights = check_model(loaded, policy, rows), None
    else:
        logger.info("%s does not fit on the device: weights %s", source.name, plan.describe())
        few = _check_first_layers(source, plan, space, policy, rows)
        checked, loaded, weights = _load_offloaded(source, whole, plan, few, device, folder, meter)
    log_choice(loaded, checked)
    for tier, count in plan.resident_bytes.items():
        meter.hold(tier, "resident weights", count)
    placed = replace(policy, weights=plan.shares)
    return Parts(loaded, device, checked, placed, plan, space, placing.limits, weights, folder, meter)


def measure_space(device: Device, placing: Placing, folder: Path) -> Space:
    """Return what may be used of each tier: what is free, and no more than the user allows."""
    limits, free = placing.limits, free_space(device.torch_device, folder)
    free["disk"] += sum(path.stat().st_blocks * 512 for path in folder.glob("*.slab"))  # what is written needs no more space
    available = {tier: min(count, limits.get(tier, count)) for tier, count in free.items()}
    if not device.own_memory and {"device", "host"} & limits.keys():
        ram = limits.get("device", 0) + limits.get("host", 0)
        available["device"] = available["host"] = min(free["host"], ram)
    return Space(available, device.own_memory, limits)


def free_space(device: torch.device, folder: Path) -> dict[Tier, int]:
    """Bytes of each tier that are free now, without what any process takes as it goes on."""
    free: dict[Tier, int] = {"device": free_bytes(device), "host": free_bytes(CPU.torch_device), "disk": _free_disk(folder)}
    return free | {tier: max(0, free[tier] - PROCESS_BYTES) for tier in TIERS[:2]}


def make_folder(folder: Path) -> None:
    """Make the offload folder.

    Raises:
        FlexGenError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlexGenError(f"offload_folder {folder} cannot be created ({error}). Give another folder.") from error


def _empty(source: ModelSource) -> PreTrainedModel:
    whole = source.empty()
    try:
        layers_of(whole)
    except UnsupportedModel as error:
        name = f"{source.name} ({whole.config.model_type})"
        raise UnsupportedModel(f"{name} cannot be run layer by layer: {error}. {ALTERNATIVE}") from error
    return whole


def _load_resident(source: ModelSource, plan: WeightPlan, space: Space, rows: KindChoice) -> LoadedModel:
    size = sum(plan.sizes.values())
    if size > LARGE_BYTES:
        _check_first_layers(source, plan, space, resolved(None, Device(source.device), few_requests=True), rows)
        logger.info("%s fits on the device (%s): nothing is offloaded", source.name, gib(size))
    return source.load()


def _load_offloaded(
    source: ModelSource,
    whole: PreTrainedModel,
    plan: WeightPlan,
    few: tuple[Kind, Verdict, str | None],
    device: Device,
    folder: Path,
    meter: Meter,
) -> tuple[CheckedModel, LoadedModel, WeightStore | None]:
    """Load a model of which the first layers were checked, layer by layer, to where the plan puts them."""
    kind, verdict, not_packed = few
    verdict = verdict.of_all_layers(layer_kinds(whole, layers_of(whole)))
    identity = {"weights": source.digest(), "dtype": str(source.dtype), "transformers": library_version}
    offloader = Offloader(plan, device=device, folder=folder, identity=identity)
    try:
        loaded = source.load(offloader)
        model = RecordedModel(loaded.model, device=device.torch_device)
        weights = offloader.store(loaded.model, model.layers, meter)
    except BaseException:
        offloader.close()
        raise
    return CheckedModel(kind, model, verdict, not_packed), loaded, weights


def _check_first_layers(
    source: ModelSource, plan: WeightPlan, space: Space, policy: ResolvedPolicy, rows: KindChoice
) -> tuple[Kind, Verdict, str | None]:
    """What `check_model` says of the first layers, of which nothing stays in memory."""
    if space.own_memory and plan.first_layers_bytes + plan.checking_bytes > space.of("device"):
        logger.info("%s: the first layers are checked on the CPU, since the device has no room for their copy", source.name)
        source, policy = replace(source, device=CPU.torch_device), resolved(None, CPU, few_requests=True)
    checked = check_model(source.first_layers(), policy, rows)
    found = checked.kind, checked.verdict, checked.not_packed
    del checked
    gc.collect()
    return_freed_memory()
    return found


def _free_disk(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise PolicyError(f"offload_folder {folder} cannot be used ({error}). Give another folder.") from error

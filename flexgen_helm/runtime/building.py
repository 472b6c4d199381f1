"""Construction of an engine: plan its memory, load and check the model, make its scheduler and executor."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexgen_helm.compression.config import CompressionConfig
from flexgen_helm.compression.schemes import FORMAT_VERSION, scheme_of
from flexgen_helm.distributed.neighbours import StageNeighbours
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.execution.interfaces import Executor, Rows
from flexgen_helm.execution.overlapped import OverlappedExecutor
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.kv_cache.pages import PAGE_TOKENS, num_pages
from flexgen_helm.loading.source import LoadedModel, ModelSource, dtype_name
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.device_limit import DEVICE_LIMITS
from flexgen_helm.memory.hidden_store import HiddenStore
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.workspaces import make_workspaces
from flexgen_helm.model.compiled.layers import by_inductor
from flexgen_helm.model.layers import layers_of
from flexgen_helm.policy.capacity import Capacity
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.rows.choice import ALTERNATIVE, CacheStorage, CheckedModel, log_choice, make_rows
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.runtime.engine_plan import plan_engine
from flexgen_helm.runtime.fitting.fit import FittedModel, fit
from flexgen_helm.runtime.free_space import free_space, make_folder
from flexgen_helm.runtime.load_model import Blueprint, PlacedModel, load_and_check
from flexgen_helm.runtime.pipeline.rows import make_stage_rows
from flexgen_helm.runtime.pipeline.stage import Stage, refuse_extra_outputs
from flexgen_helm.runtime.planning.automatic import Automatic
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS
from flexgen_helm.runtime.slab_coding import require_codable
from flexgen_helm.runtime.slab_places import SlabPlaces, default_folder, slab_identity
from flexgen_helm.schedule.work import Scheduler
from flexgen_helm.types import (
    ON_DEVICE,
    CacheNumerics,
    Kernel,
    MachineNumerics,
    Numerics,
    ResolvedPolicy,
    RowNumerics,
    StageInfo,
    Tier,
    WeightNumerics,
)

logger = logging.getLogger(__name__)

NUMERICS_VERSION = 7
"""Version of the numerics: raised whenever answers may change by a bit for equal weights, dtype and row sizes."""


@dataclass(frozen=True)
class Parts:
    """The parts of an engine."""

    loaded: LoadedModel
    checked: CheckedModel
    device: Device
    policy: ResolvedPolicy
    """Policy with the realised shares of weights."""
    numerics: Numerics
    kv_dtype: torch.dtype
    plan: MemoryPlan
    cache_bytes: Mapping[Tier, int]
    """Bytes for K and V on each tier."""
    schedulers: Sequence[Scheduler]
    """One for each sweep that may be in flight: several in a pipeline."""
    executor: Executor
    folder: Path
    """Folder for everything on disk; it may not exist."""
    meter: Meter
    released_dtype: str = ""
    """See `EngineInfo`."""
    fitted: FittedModel | None = None
    """The quantised model; None: weights are not compressed."""
    automatic: Automatic | None = None
    """What the search of a policy found; None: nothing was searched."""
    neighbours: StageNeighbours | None = None
    """The other stages of a pipeline; None: there are none."""
    stages: tuple[StageInfo, ...] = ()
    """All stages of a pipeline; none: there is one process."""
    held: ExitStack = field(default_factory=ExitStack)
    """What is released when the engine is closed, after the executor."""

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the first lane."""
        return self.schedulers[0]


def build(source: ModelSource, options: EngineOptions, write_text: Callable[[Path], Tensor]) -> Parts:
    """Make the parts of an engine.

    Args:
        source: Model folder with its config and tokenizer.
        options: Options of the user.
        write_text: Lets the uncompressed model, with its slabs in a folder, write text, int64 ``[rows, tokens]``; called if
            weights are fitted to it.

    Raises:
        UnsupportedModel: If the model would be computed wrongly, or its layers cannot be placed as the policy says.
        PolicyError: If the plan needs more memory than may be used, or the policy asks for something impossible.
        CorruptFile: If files are missing or torn.
        DiskFull: If there is no space for everything that the plan puts on disk.
    """
    with options.device.current(), ExitStack() as held:
        held.enter_context(DEVICE_LIMITS.hold(options.device, options.limits.get("device")))
        blueprint = _draw(source, options, write_text)
        try:
            with PRECISE_PRODUCTS.hold():
                placed = load_and_check(blueprint)
        except BaseException:
            if blueprint.fitted is not None:
                blueprint.fitted.slabs.close()
            raise
        blueprint = replace(blueprint, plan=blueprint.plan.with_slabs(placed.disk_bytes))
        log_choice(placed.loaded, placed.checked.passed)
        for tier, count in blueprint.plan.weights.resident_bytes.items():
            blueprint.meter.hold(tier, "resident weights", count)
        try:
            parts = _assemble(blueprint, placed, options)
        except BaseException:
            if placed.weights is not None:
                placed.weights.close()
            raise
        return replace(parts, held=held.pop_all())


def _assemble(blueprint: Blueprint, placed: PlacedModel, options: EngineOptions) -> Parts:
    """Make the scheduler and the executor of a loaded model."""
    device, plan, meter, folder = options.device, blueprint.plan, blueprint.meter, blueprint.folder
    policy, kv_dtype = replace(blueprint.policy, weights=plan.weights.shares), blueprint.kv_dtype
    if policy.cache[2] or policy.hidden[2]:
        make_folder(folder)
    if not device.own_memory:
        placed.checked.model.pack_weights((policy.gpu_batch_size, policy.gpu_batch_tokens))
    make_workspaces(device, blueprint.source.dtype)
    page_bytes = plan.page_bytes(placed.checked.passed.verdict.cache_bytes_per_token)
    most = math.inf
    if device.is_gpu and placed.checked.passed.kind == "packed":  # whose pages are made at once
        lanes = policy.num_lanes or 1
        most = lanes * policy.block_size * plan.cache.sequence_bytes(PAGE_TOKENS * num_pages(0, placed.loaded.max_length))
    storage = CacheStorage(
        Capacity.of(plan, free_space(device, folder), most),
        page_bytes,
        device=device,
        kv_dtype=kv_dtype,
        cache_format=options.cache_format,
        folder=folder,
        meter=meter,
    )
    rows, schedulers = _rows(placed.checked, policy, storage, options)
    hidden = None
    if policy.hidden != ON_DEVICE:
        hidden = HiddenStore(policy.hidden, device=device, folder=folder, meter=meter)
    executor = (OverlappedExecutor if policy.overlap else SerialExecutor)(
        rows, head_slice=policy.gpu_batch_size, order=options.order, weights=placed.weights, hidden=hidden, meter=meter
    )
    executor.free_shapes = options.free_shapes
    neighbours = _join(executor, blueprint, placed, options.stage)
    parts = Parts(
        loaded=placed.loaded,
        checked=placed.checked,
        device=device,
        policy=policy,
        numerics=numerics_of(
            blueprint.weights,
            placed.checked,
            policy,
            device,
            cache_numerics(kv_dtype, options.compression),
            rows.kernel if isinstance(rows, PackedRows) else "torch",
        ),
        kv_dtype=kv_dtype,
        plan=plan,
        cache_bytes=storage.capacity.cache_bytes,
        schedulers=schedulers,
        executor=executor,
        folder=folder,
        meter=meter,
        released_dtype=blueprint.source.released_dtype,
        fitted=blueprint.fitted,
        automatic=blueprint.automatic,
        neighbours=neighbours,
    )
    if options.stage is None or blueprint.layers is None:
        return parts
    options.stage.require_equal(parts.numerics)
    return replace(parts, stages=options.stage.all_infos(plan, blueprint.layers, parts.cache_bytes))


def _rows(
    checked: CheckedModel, policy: ResolvedPolicy, storage: CacheStorage, options: EngineOptions
) -> tuple[Rows[Any], Sequence[Scheduler]]:
    if options.stage is not None:
        return make_stage_rows(checked, policy, storage, options.stage)
    return make_rows(checked, policy, storage, keep_all=options.order != "zigzag")


def _join(
    executor: SerialExecutor[Any], blueprint: Blueprint, placed: PlacedModel, stage: Stage | None
) -> StageNeighbours | None:
    """Connect the executor with the other stages of a pipeline, if there are any."""
    if stage is None or blueprint.layers is None:
        return None
    refuse_extra_outputs(placed.checked.model, blueprint.layers)
    neighbours = stage.neighbours(placed.loaded.model, blueprint.layers, blueprint.policy, blueprint.device)
    executor.join(neighbours)
    return neighbours


def numerics_of(
    weights: WeightNumerics,
    checked: CheckedModel,
    policy: ResolvedPolicy,
    device: Device,
    cache: CacheNumerics,
    kernel: Kernel = "torch",
) -> Numerics:
    """Return everything besides the job that decides the bits of an answer."""
    on_host = device.is_gpu and checked.passed.kind == "packed" and policy.cpu_attention > 0 and policy.cache[1] > 0
    model = checked.model
    place = "host" if on_host else "device"
    return Numerics(
        weights,
        cache,
        RowNumerics(checked.passed.kind, policy.gpu_batch_size, policy.gpu_batch_tokens),
        MachineNumerics(device.torch_device.type, place, model.matmul, model.compiled is not None, kernel),
        NUMERICS_VERSION,
    )


def cache_numerics(kv_dtype: torch.dtype, compression: CompressionConfig | None) -> CacheNumerics:
    """Return the form in which K and V of a variant are stored and read."""
    if compression is None:
        return CacheNumerics(dtype_name(kv_dtype))
    return CacheNumerics(dtype_name(kv_dtype), compression.cache_scheme, (compression.sparsity or 100) / 100)


def _draw(source: ModelSource, options: EngineOptions, write_text: Callable[[Path], Tensor]) -> Blueprint:
    """Decide everything that can be decided before weights are read."""
    whole = _empty(source)
    kv_dtype = options.kv_dtype or source.dtype
    fitted: FittedModel | None = None
    weights = WeightNumerics(source.digest(), dtype_name(source.dtype))
    places = SlabPlaces(weights, options.folder)
    compressed = options.compression is not None and options.compression.bits is not None
    require_codable(options.asked.slab_coding, source.dtype, compressed=compressed)
    if options.compression is not None and compressed:
        with options.stage.group.first_stage_first("fit") if options.stage is not None else nullcontext():
            weights, folder, fitted = _fit(source, options, options.compression, write_text)
        places = SlabPlaces(weights, folder)
    try:
        planned = plan_engine(source, options, kv_dtype, places, fitted)
    except BaseException:
        if fitted is not None:
            fitted.slabs.close()
        raise
    return Blueprint(
        fitted=fitted,
        source=source,
        whole=whole,
        device=options.device,
        policy=planned.policy,
        rows=options.rows,
        kv_dtype=kv_dtype,
        recheck=options.recheck,
        formats=planned.formats,
        plan=planned.memory,
        weights=weights,
        automatic=planned.automatic,
        folder=places.folder("lossless" if planned.policy.slab_coding == "lossless" else "plain"),
        meter=Meter(options.device.torch_device),
        compiled=by_inductor() if options.compile_layers else None,
        layers=planned.layers,
    )


def _fit(
    source: ModelSource, options: EngineOptions, compression: CompressionConfig, write_text: Callable[[Path], Tensor]
) -> tuple[WeightNumerics, Path, FittedModel]:
    """Return the identity of compressed weights, their folder, and the quantised model, which is made if it is missing."""
    assert compression.bits is not None
    # Slabs are made from float32 and rounded when they are unpacked, so that all dtypes share them.
    shared = WeightNumerics(source.digest(), "float32", compression.weight_scheme)
    identity = {**slab_identity(shared), "format": str(FORMAT_VERSION)}
    folder = options.folder or default_folder(shared, identity, "compressed")
    fitted = fit(source, scheme_of(compression.scheme, compression.bits), folder, identity, write_text)
    return replace(shared, dtype=dtype_name(source.dtype), statistics=fitted.decisions), folder, fitted


def _empty(source: ModelSource) -> PreTrainedModel:
    whole = source.empty
    try:
        layers_of(whole)
    except UnsupportedModel as error:
        name = f"{source.name} ({whole.config.model_type})"
        raise UnsupportedModel(f"{name} cannot be run layer by layer: {error}. {ALTERNATIVE}") from error
    return whole

"""Choice between packed and single rows for a model, and construction of the chosen rows and their scheduler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from flexgen_helm.errors import FlexGenError, PolicyError, UnsupportedModel
from flexgen_helm.execution.interfaces import Rows
from flexgen_helm.generation.job_errors import not_finite
from flexgen_helm.kv_cache.cache_format import CacheFormat
from flexgen_helm.kv_cache.paged_cache import PagedCache
from flexgen_helm.kv_cache.pages import Form, PagePool
from flexgen_helm.kv_cache.state_store import StateStore
from flexgen_helm.loading.source import LoadedModel
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.model.compiled.layers import CompiledLayers
from flexgen_helm.model.recorder import RecordedModel
from flexgen_helm.policy.capacity import Capacity, packed_scheduler, page_pools
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.rows.packed_check import check_packed
from flexgen_helm.rows.self_check import FirstLayers, NotNumbers, Verdict
from flexgen_helm.rows.single import SingleRows, check_cache_shares, require_plain_cache
from flexgen_helm.rows.single_check import check_single
from flexgen_helm.schedule.single import SingleScheduler, StateSize
from flexgen_helm.schedule.work import Scheduler
from flexgen_helm.types import ResolvedPolicy

logger = logging.getLogger(__name__)

Kind = Literal["packed", "single"]
KindChoice = Literal["auto", "packed", "single"]
ALTERNATIVE = "Evaluate it with HELM's own HuggingFaceClient."
PINNED_ROOM = 2
"""Bytes that torch's pinned memory takes for a byte of a state at most: it is rounded up to a power of two."""
CHECKS: dict[Kind, Callable[..., Verdict]] = {"packed": check_packed, "single": check_single}


@dataclass(frozen=True)
class Passed:
    """What the self-check found of a model that passed it in one kind of rows."""

    kind: Kind
    verdict: Verdict
    not_packed: str | None
    """Reason why the model does not run in packed rows; None if it does, or if they were not tried."""


@dataclass(frozen=True)
class CheckedModel:
    """A model that runs in the kind of rows in which it passed the self-check."""

    model: RecordedModel
    passed: Passed


def validated_kind(rows: str) -> KindChoice:
    """Return the kind of rows that a user asked for.

    Raises:
        FlexGenError: If the kind is unknown.
    """
    if rows not in ("auto", *CHECKS):
        raise FlexGenError(f"rows is {rows!r}. Give 'auto', {' or '.join(map(repr, CHECKS))}.")
    return rows  # type: ignore[return-value]


def check_model(
    loaded: LoadedModel,
    policy: ResolvedPolicy,
    rows: KindChoice,
    first: FirstLayers | None = None,
    compiled: CompiledLayers | None = None,
) -> CheckedModel:
    """Check a model in one kind of rows; "auto" tries packed rows, then single rows.

    Args:
        loaded: The model.
        policy: Policy with the row sizes.
        rows: Kind of rows that the user asked for.
        first: Reads the model's first layers, for comparisons in fp32; None: they are copied.
        compiled: Compiles layers, in packed rows only; None: layers run as they are.

    Raises:
        UnsupportedModel: If the model would be computed wrongly, or its layers cannot be compiled.
    """
    name = f"{loaded.name} ({loaded.model.config.model_type})"
    refusals: dict[str, str] = {}
    try:
        model = RecordedModel(loaded.model, compiled=compiled)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{name} cannot be run layer by layer: {error}. {ALTERNATIVE}") from error
    for kind, check in CHECKS.items():
        if rows in ("auto", kind) and (compiled is None or kind == "packed"):
            try:
                verdict = check(model, policy, max_length=loaded.max_length, first=first)
            except NotNumbers as error:
                raise UnsupportedModel(f"{name} {not_finite(loaded.model.dtype)} ({error}.)") from error
            except UnsupportedModel as error:
                refusals[kind] = str(error)  # the error itself would keep the check's tensors
                continue
            return CheckedModel(model, Passed(kind, verdict, refusals.get("packed")))
    if compiled is not None:
        raise UnsupportedModel(f"{name} cannot run with compiled layers: {refusals['packed']}. Leave compile_layers out.")
    reasons = "; ".join(f"in {kind} rows {error}" for kind, error in refusals.items())
    alternative = "Leave rows at 'auto' to try single rows." if rows == "packed" else ALTERNATIVE
    raise UnsupportedModel(f"{name} would be computed wrongly: {reasons}. {alternative}")


def log_choice(loaded: LoadedModel, passed: Passed) -> None:
    """Log why a model runs in single rows, and if answers may depend on the batch by a bit; log nothing in the usual case."""
    name = f"{loaded.name} ({loaded.model.config.model_type})"
    if passed.not_packed is not None:
        logger.info("%s runs in single rows (one sequence per row), because in packed rows %s", name, passed.not_packed)
    if passed.verdict.bit_stable is None:
        logger.info(
            "%s: whether results differ in the last digits depending on the batch was not measured on the device that computes",
            name,
        )
    elif not passed.verdict.bit_stable:
        logger.info(
            "%s: on this machine results may differ in the last digits depending on the batch (the bit-stability check failed)",
            name,
        )


@dataclass(frozen=True)
class CacheStorage:
    """Storage for K and V, or for other state that sequences keep between sweeps."""

    capacity: Capacity
    """Bytes on each tier, and tokens of a block."""
    page_bytes: Mapping[Form, int]
    """Bytes of a page in all layers, by form, in packed rows."""
    device: Device
    kv_dtype: torch.dtype
    """Dtype in which exact K and V are stored."""
    cache_format: CacheFormat
    folder: Path
    meter: Meter


def make_rows(
    checked: CheckedModel, policy: ResolvedPolicy, storage: CacheStorage, *, keep_all: bool
) -> tuple[Rows[Any], Sequence[Scheduler]]:
    """Make the rows object that computes a model, and the scheduler that plans its sweeps.

    Args:
        checked: The model, with the kind of rows that it passed.
        policy: Row sizes and shares.
        storage: Storage for K and V or other state.
        keep_all: Whether the operations have another order than the column order, which needs K and V of all layers.

    Raises:
        PolicyError: If the policy asks for something that rows of this kind cannot do.
        DiskFull: If there is no space for the cache's share on disk.
    """
    verdict, device = checked.passed.verdict, storage.device
    if checked.passed.kind == "single":
        check_cache_shares(policy.cache)
        require_plain_cache(storage.cache_format)
        if storage.kv_dtype != checked.model.model.dtype:
            raise PolicyError("kv_dtype cannot be set in single rows: the model's own cache has its dtype. Leave it out.")
        store = None
        if device.own_memory and policy.cache[1]:
            store = StateStore(device.torch_device, share=policy.cache[1], meter=storage.meter)
        size = StateSize(verdict.cache_bytes_per_sequence, verdict.cache_bytes_per_token)
        capacity = sum(storage.capacity.cache_bytes.values())
        if store is not None and device.is_gpu:
            capacity //= PINNED_ROOM
        tokens = storage.capacity.block_tokens
        single = SingleScheduler(policy, block_tokens=tokens, capacity_bytes=capacity, size=size)
        return SingleRows(checked.model, store), [single]
    pools = page_pools(policy, storage.capacity, storage.page_bytes)
    packed = packed_scheduler(policy, storage.capacity.block_tokens, pools, is_gpu=device.is_gpu, keep_all=keep_all)
    return packed_rows(checked, policy, storage, pools), [packed]


def packed_rows(
    checked: CheckedModel, policy: ResolvedPolicy, storage: CacheStorage, pools: Mapping[Form, PagePool]
) -> PackedRows:
    """Make the rows object that computes a model in packed rows, with pages that are accounted for in ``pools``."""
    cache = PagedCache(
        pools,
        cache_format=storage.cache_format,
        device=storage.device,
        dtype=storage.kv_dtype,
        offload_folder=storage.folder,
        meter=storage.meter,
    )
    cpu_attention = policy.cpu_attention if policy.cache[1] else 0.0
    return PackedRows(checked.model, cache, cpu_attention=cpu_attention, heads=checked.passed.verdict.heads)

"""Rows and schedulers of a stage: pages are numbered alike on all stages, and lanes divide them."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.policy.capacity import lane_schedulers, page_pools
from flexgen_helm.rows.choice import CacheStorage, CheckedModel, packed_rows
from flexgen_helm.rows.packed import PackedRows
from flexgen_helm.runtime.pipeline.stage import ALONE, Stage
from flexgen_helm.schedule.work import Scheduler
from flexgen_helm.types import ResolvedPolicy


def make_stage_rows(
    checked: CheckedModel, policy: ResolvedPolicy, storage: CacheStorage, stage: Stage
) -> tuple[PackedRows, Sequence[Scheduler]]:
    """Make the rows object of a stage, and the schedulers of its lanes, of which the first stage alone makes use.

    Args:
        checked: The model.
        policy: Row sizes and shares.
        storage: Storage for K and V of this stage's layers.
        stage: The stage.

    Raises:
        UnsupportedModel: If the model runs in single rows.
    """
    if checked.passed.kind != "packed":
        name = checked.model.model.name_or_path
        raise UnsupportedModel(f"{name} runs in single rows, which cannot be divided into stages. {ALONE}")
    pools = page_pools(policy, storage.capacity, storage.page_bytes)
    pools, block_tokens = stage.agreed_pools(pools, storage.capacity.block_tokens)
    is_gpu = storage.device.is_gpu
    schedulers = lane_schedulers(policy, block_tokens, pools, lanes=stage.num_lanes(policy), is_gpu=is_gpu)
    return packed_rows(checked, policy, storage, pools), schedulers

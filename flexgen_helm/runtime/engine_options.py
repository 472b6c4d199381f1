"""Options of an engine: what a user gives in addition to the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flexgen_helm.compression.config import CompressionConfig
from flexgen_helm.errors import FlexGenError, PolicyError
from flexgen_helm.kv_cache.cache_format import PLAIN_CACHE, CacheFormat
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.memory.device import Device
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.rows.choice import KindChoice
from flexgen_helm.runtime.pipeline.stage import Stage, require_divisible
from flexgen_helm.schedule.operations import Order
from flexgen_helm.types import Policy, Tier


@dataclass(frozen=True)
class EngineOptions:
    """Options that a user gives for an engine in addition to the model."""

    device: Device
    policy: Policy | None = None
    """Policy of the user; None: ``Policy(auto=True)``."""
    rows: KindChoice = "auto"
    order: Order = "zigzag"
    kv_dtype: torch.dtype | None = None
    """Dtype in which K and V are stored and attention reads them; None: the model's."""
    compression: CompressionConfig | None = None
    """What is compressed; None: nothing."""
    limits: Mapping[Tier, int] = field(default_factory=dict)
    """Most bytes of the tiers that the user names."""
    folder: Path | None = None
    """Folder for everything on disk; None: a folder under the cache folder."""
    recheck: bool = False
    """Whether the self-check is repeated though an equal one passed before."""
    free_shapes: bool = False
    """Whether rows have no padding, which is for measuring what fixed sizes cost: bits depend on neighbours."""
    compile_layers: bool = False
    """Whether layers are compiled (`flexgen_helm.model.compiled`)."""
    workload: Workload | None = None
    """What the engine will be asked, for the search of a policy; None: unknown, so nothing is searched."""
    profile: MachineProfile | None = None
    """The machine with which the search predicts; None: this one, measured where that was not done before."""

    stage: Stage | None = None
    """The stage of a pipeline that this process computes; None: all layers."""

    def __post_init__(self) -> None:
        if self.stage is not None:
            require_divisible(order=self.order, free_shapes=self.free_shapes, slab_coding=self.asked.slab_coding)
        elif self.asked.num_lanes is not None:
            raise PolicyError(
                f"num_lanes is {self.asked.num_lanes}, but layers are not divided into stages, so one sweep is in flight. "
                "Leave it out, or start several processes with torchrun."
            )
        if self.compile_layers and self.free_shapes:
            raise FlexGenError("Layers are compiled for rows of fixed sizes. Leave free_shapes or compile_layers out.")
        if self.compile_layers and self.rows == "single":
            raise FlexGenError("Layers are compiled in packed rows only. Leave rows or compile_layers out.")

    @property
    def cache_format(self) -> CacheFormat:
        """Format of K and V."""
        return cache_format_of(self.compression)

    @property
    def asked(self) -> Policy:
        """Policy of the user; if there is none, one that is searched."""
        return self.policy or Policy(auto=True)


def cache_format_of(compression: CompressionConfig | None) -> CacheFormat:
    """Return the format of K and V in a variant."""
    if compression is None:
        return PLAIN_CACHE
    return CacheFormat(compression.k_bits, compression.v_bits, compression.sparsity, compression.flexgen)

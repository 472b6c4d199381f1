"""What `Engine.from_pretrained` is given, and what is made of it before anything is planned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from flexgen_helm.compression.config import CompressionConfig, resolve
from flexgen_helm.errors import PolicyError
from flexgen_helm.loading.source import ModelSource, named_dtype, open_dummy, open_model
from flexgen_helm.loading.versions import warn_if_untested
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.machine.profile_file import named_profile
from flexgen_helm.memory.amounts import MaxMemory, parse_max_memory
from flexgen_helm.memory.device import Device, resolve_device
from flexgen_helm.rows.choice import KindChoice, validated_kind
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.runtime.pipeline.stage import Stage
from flexgen_helm.schedule.operations import ORDERS, Order
from flexgen_helm.types import Policy


@dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """Arguments of `Engine.from_pretrained`, where they are explained. Stages of a pipeline tell them each other."""

    name_or_path: str
    dtype: str = "auto"
    device: str | Device = "auto"
    policy: Policy | Literal["auto"] | None = None
    profile: str | Path | MachineProfile | None = None
    max_memory: MaxMemory | None = None
    offload_folder: str | Path | None = None
    kv_dtype: str | None = None
    compression: str | CompressionConfig | None = None
    revision: str | None = None
    order: Order = "zigzag"
    rows: KindChoice = "auto"
    dummy_weights: bool = False
    recheck: bool = False
    free_shapes: bool = False
    compile_layers: bool = False

    @cached_property
    def _resolved(self) -> tuple[str, CompressionConfig | None]:
        """Name without variant, and the variant."""
        return resolve(self.name_or_path, self.compression)

    def options(self, stage: Stage | None = None) -> EngineOptions:
        """Return the options of an engine, or of a stage of it.

        Raises:
            FlexGenError: If one of them does not exist.
        """
        if self.order not in ORDERS:
            raise PolicyError(f"order is {self.order!r}. Give one of {', '.join(map(repr, ORDERS))}.")
        if self.policy != "auto" and not isinstance(self.policy, Policy | None):
            raise PolicyError(f"policy is {self.policy!r}. Give a Policy, such as Policy(gpu_batch_size=16), or 'auto'.")
        return EngineOptions(
            resolve_device(self.device),
            None if self.policy == "auto" else self.policy,
            validated_kind(self.rows),
            self.order,
            None if self.kv_dtype is None else named_dtype("kv_dtype", self.kv_dtype),
            self._resolved[1],
            parse_max_memory(self.max_memory),
            Path(self.offload_folder) if self.offload_folder else None,
            self.recheck,
            self.free_shapes,
            self.compile_layers,
            profile=named_profile(self.profile) if isinstance(self.profile, str | Path) else self.profile,
            stage=stage,
        )

    def source(self, options: EngineOptions) -> ModelSource:
        """Open the model.

        Raises:
            UnsupportedModel: If models of this kind cannot be run.
            CorruptFile: If files are missing or torn.
            FlexGenError: If there is no such model or dtype.
        """
        warn_if_untested()
        name, where = self._resolved[0], options.device.torch_device
        if self.dummy_weights:
            return open_dummy(name, dtype=self.dtype, device=where)
        return open_model(name, dtype=self.dtype, device=where, revision=self.revision)

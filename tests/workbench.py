"""Tiny models, their references and engines, each made once in a test session."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from flexgen_helm import Engine, Policy
from flexgen_helm.memory.device import Device
from flexgen_helm.rows.choice import KindChoice
from flexgen_helm.types import ResolvedPolicy
from tests.models import save_tiny
from tests.reference import Reference

POLICY = ResolvedPolicy(gpu_batch_size=16, num_gpu_batches=4, gpu_batch_tokens=32, block_tokens=4096)
"""Row sizes are multiples of 16, so that one thread computes every token alike; everything fits in one block."""
NARROW = ResolvedPolicy(gpu_batch_size=16, num_gpu_batches=1, gpu_batch_tokens=32, block_tokens=96)
"""The same row sizes with a block so small that jobs must wait for each other."""
OWN_MEMORY = Device(torch.device("cpu"), own_memory=True)
"""The CPU as a device that has a memory of its own, as a GPU has."""


class Workbench:
    """Makes each model folder, reference and engine once, and keeps it."""

    def __init__(self, root: Path, num_layers: int | None = None) -> None:
        self._root, self._num_layers = root, num_layers
        self._folders: dict[str, Path] = {}
        self._references: dict[tuple[str, str], Reference] = {}
        self._engines: dict[tuple[str, str, Policy, str, str], Engine] = {}

    def folder(self, family: str) -> Path:
        """Returns the folder of a tiny model."""
        if family not in self._folders:
            self._folders[family] = save_tiny(family, self._root, num_layers=self._num_layers)
        return self._folders[family]

    def reference(self, family: str, *, dtype: str = "float32") -> Reference:
        """Returns the model as plain ``transformers`` runs it."""
        key = (family, dtype)
        if key not in self._references:
            self._references[key] = Reference(self.folder(family), dtype=dtype)
        return self._references[key]

    def engine(
        self,
        family: str,
        *,
        policy: Policy = POLICY,
        dtype: str = "float32",
        order: Literal["row", "zigzag"] = "zigzag",
        rows: KindChoice = "auto",
    ) -> Engine:
        """Returns an open engine on the CPU."""
        key = (family, dtype, policy, order, rows)
        if key not in self._engines:
            self._engines[key] = Engine.from_pretrained(
                str(self.folder(family)), dtype=dtype, device="cpu", policy=policy, order=order, rows=rows
            )
        return self._engines[key]

    def close(self) -> None:
        """Closes all engines."""
        for engine in self._engines.values():
            engine.close()

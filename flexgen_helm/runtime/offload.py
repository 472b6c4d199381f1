"""Offloader: stores each unit of a model on its tier during loading, and makes the weight store."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexgen_helm.compression.lossless_slab import LosslessSlab, encode_slab
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.slab import Binding, SlabFormat, pack
from flexgen_helm.memory.slab_folder import SlabFolder
from flexgen_helm.memory.weight_store import Unit, WeightStore
from flexgen_helm.model.embeddings import keep_on_host
from flexgen_helm.policy.model_shapes import EMBEDDINGS
from flexgen_helm.policy.weight_plan import WeightPlan
from flexgen_helm.schedule.operations import head_unit

logger = logging.getLogger(__name__)


class Offloader:
    """Stores the layers of a model on the tiers of a plan while it is loaded.

    It is a `flexgen_helm.loading.assembly.LayerKeeper`.
    """

    def __init__(
        self,
        plan: WeightPlan,
        formats: Mapping[int, SlabFormat],
        *,
        device: Device,
        folder: Path,
        identity: Mapping[str, str],
        coded: torch.dtype | None = None,
    ) -> None:
        """Open the folder of slabs and check its space, if the plan puts anything on disk.

        Args:
            plan: Plan with the tier of each unit.
            formats: Plain slab formats by unit number, for the layers and an output head with weights of its own.
            device: The device that computes.
            folder: Folder for slabs on disk.
            identity: Identity of the slabs. Slabs with another identity are never used.
            coded: Dtype of the weights that are coded without loss on disk; None: they are not coded.

        Raises:
            CorruptFile: If the folder holds slabs of other weights.
            DiskFull: If there is no space for the slabs that are missing.
        """
        self._plan, self._formats, self._device, self._coded = plan, dict(formats), device, coded
        self._slabs: SlabFolder | None = None
        self._written: frozenset[int] = frozenset()
        self._stored: dict[int, Tensor] = {}
        if plan.on_disk:
            self._open(folder, identity)

    def _open(self, folder: Path, identity: Mapping[str, str]) -> None:
        """Open the folder, find the slabs that are there, and check that there is space for the others."""
        on_disk = self._plan.on_disk
        layouts = {j: self._formats[j].stored for j in on_disk}
        if self._coded is not None:  # whose layouts follow from their content
            found = SlabFolder.described(folder)
            layouts = {j: found[j] for j in on_disk if j in found}
        self._slabs = SlabFolder(folder, identity, layouts)
        self._written = frozenset(layouts) - set(self._slabs.missing())
        if self._coded is not None:
            self._formats |= {j: LosslessSlab(layouts[j], self._formats[j].bound, self._coded) for j in self._written}
        missing = [j for j in on_disk if j not in self._written]
        try:
            self._slabs.check_space(sum(self._formats[j].stored.num_bytes for j in missing))
        except BaseException:
            self._slabs.close()
            raise
        if missing:
            logger.info("writing %s of %s slabs into %s", len(missing), len(on_disk), folder)

    @property
    def disk_bytes(self) -> dict[int, int]:
        """Bytes of each slab on disk, by the number of its unit; complete once the model is loaded."""
        return {j: self._formats[j].stored.num_bytes for j in self._plan.on_disk}

    def has(self, j: int) -> bool:
        """Return whether the slab of layer j is already on disk, or the plan has no such layer."""
        return j in self._written or j not in self._plan.tiers

    def keep(self, j: int, layer: nn.Module) -> None:
        """Store a layer's weights on its tier.

        Args:
            j: Number of the layer.
            layer: The layer, filled with its weights.

        Raises:
            DiskFull: If there is no space for its slab.
        """
        form, tier = self._formats[j], self._plan.tiers[j]
        binding = Binding(layer, form.bound)
        if j not in self._plan.streamed and not self._device.is_gpu:
            return  # weights are used where they are
        memory = allocate(form.stored.num_bytes, pin=self._device.is_gpu and tier == "host")
        pack(layer, form.bound, memory)
        if tier == "device":
            binding.bind(memory.to(self._device.torch_device))
            return
        binding.to_meta()
        if tier == "disk":
            self._write(j, memory)
        else:
            self._stored[j] = memory

    def _write(self, j: int, memory: Tensor) -> None:
        """Write the slab of a unit, coded if that is asked for."""
        assert self._slabs is not None
        if self._coded is None:
            self._slabs.write(j, memory)
            return
        stored, self._formats[j] = encode_slab(memory, self._formats[j].bound, self._coded)
        self._slabs.write(j, stored, self._formats[j].stored)

    def store(self, model: PreTrainedModel, layers: list[nn.Module], meter: Meter) -> WeightStore | None:
        """Make the weight store of a loaded model; None if all weights are resident.

        Args:
            model: The loaded model.
            layers: Its decoder layers.
            meter: Measures the transfers.
        """
        plan, head = self._plan, head_unit(len(layers))
        if plan.own_memory and plan.tiers[EMBEDDINGS] == "host":
            keep_on_host(model, self._device.torch_device)
        if not plan.streamed:
            return None
        modules = dict(enumerate(layers))
        output = model.get_output_embeddings()
        if head in plan.streamed:
            modules[head] = output
            if not self.has(head):
                self.keep(head, output)
            else:
                Binding(output, self._formats[head].bound).to_meta()
        units = {
            j: Unit(Binding(modules[j], self._formats[j].bound), self._formats[j], self._stored.get(j)) for j in plan.streamed
        }
        return WeightStore(units, device=self._device, num_slots=plan.num_slots, source=self._slabs, meter=meter)

    def close(self) -> None:
        """Close the folder of slabs."""
        if self._slabs is not None:
            with contextlib.suppress(OSError):
                self._slabs.close()

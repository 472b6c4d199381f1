"""Quantise the units of a model one by one, and write their slabs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.scheme import MatrixKey, Parts, Scheme
from flexgen_helm.compression.slab_format import layout_of_tensors, stored_tensors
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.slab import Binding, layout_of
from flexgen_helm.memory.slab_folder import SlabFolder
from flexgen_helm.runtime.fitting.progress import LayerProgress


class PackedLayers:
    """A keeper that has all layers, so that none is read from the checkpoint.

    It is a `flexgen_helm.loading.assembly.LayerKeeper`.
    """

    def has(self, j: int) -> bool:
        """Return whether layer j is there."""
        return True

    def keep(self, j: int, layer: nn.Module) -> None:
        """Refuse: no layer is read."""
        raise AssertionError(f"layer {j} was read")


class PackingKeeper:
    """A keeper that quantises each layer as soon as it is read, writes its slab, and empties it.

    It is a `flexgen_helm.loading.assembly.LayerKeeper`.
    """

    def __init__(
        self,
        slabs: SlabFolder,
        written: Iterable[int],
        scheme: Scheme,
        decided: Mapping[MatrixKey, Parts],
        progress: LayerProgress,
    ) -> None:
        """Write nothing yet.

        Args:
            slabs: Folder of the slabs.
            written: Numbers of the slabs that are there.
            scheme: Scheme of the matrices.
            decided: What the scheme decided about each matrix.
            progress: Told of each layer.
        """
        self._slabs, self._written = slabs, frozenset(written)
        self._scheme, self._decided, self._progress = scheme, decided, progress

    def has(self, j: int) -> bool:
        """Return whether the slab of layer j is there."""
        return j in self._written

    def keep(self, j: int, layer: nn.Module) -> None:
        """Quantise a layer in float32 and write its slab.

        Raises:
            DiskFull: If there is no space for it.
            UnsupportedModel: If a weight is infinite or NaN.
        """
        packed = {}
        for tensor in matrix_tensors(layer):
            matrices = tensor.values(j, layer)
            keys = [f"{j}/{tensor.name}/{i}" for i in range(len(matrices))]
            decided = [self._decided[key] if self._scheme.needs_statistics else {} for key in keys]
            packed[tensor.name] = [self._scheme.pack(x.contiguous(), own) for x, own in zip(matrices, decided, strict=True)]
        self.write(j, layer, packed)
        Binding(layer, layout_of(layer)).to_meta()
        self._progress.done(j)

    def write(self, j: int, unit: nn.Module, packed: Mapping[str, list[Parts]]) -> None:
        """Write the slab of a unit, of which some tensors are packed."""
        tensors = stored_tensors(unit, packed)
        layout = layout_of_tensors(tensors.items())
        memory = allocate(layout.num_bytes)
        for place, tensor in zip(layout.tensors, tensors.values(), strict=True):
            place.view(memory).copy_(tensor)
        self._slabs.write(j, memory, layout)

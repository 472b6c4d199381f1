"""Read a model's matrices one by one, in its order, as often as needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from flexgen_helm.compression.matrices import matrix_tensors
from flexgen_helm.compression.scheme import MatrixKey
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.memory.slab import Binding, layout_of


class _Handing:
    """A keeper that hands each layer to another greenlet and empties it when that comes back."""

    def __init__(self, taker: greenlet) -> None:
        self._taker = taker

    def has(self, j: int) -> bool:
        return False

    def keep(self, j: int, layer: nn.Module) -> None:
        self._taker.switch((j, layer))
        Binding(layer, layout_of(layer)).to_meta()


def read_layers(source: ModelSource) -> Iterator[tuple[int, nn.Module]]:
    """Yield the layers of a model with their numbers. A layer is empty once the next one is asked for."""

    def read(taker: greenlet) -> None:
        source.read_layers(_Handing(taker))

    reader = greenlet(read)
    while (found := reader.switch(getcurrent())) is not None:
        yield found


class ModelMatrices(Mapping[MatrixKey, Tensor]):
    """The matrices of a model, fp32 ``[out, in]`` each. One layer is in memory; matrices are asked for in their order."""

    def __init__(self, source: ModelSource, keys: Sequence[MatrixKey]) -> None:
        """Nothing is read yet.

        Args:
            source: The model.
            keys: All matrices, in the order of the model.
        """
        self._source, self._keys = replace(source, dtype=torch.float32), list(keys)
        self._layers: Iterator[tuple[int, nn.Module]] = iter(())
        self._j, self._found = -1, dict[MatrixKey, Tensor]()

    def __len__(self) -> int:
        """Return the number of matrices."""
        return len(self._keys)

    def __iter__(self) -> Iterator[MatrixKey]:
        """Yield the keys in the order of the model."""
        return iter(self._keys)

    def __getitem__(self, key: MatrixKey) -> Tensor:
        """Return a matrix; the layers before it are read again if they are behind."""
        wanted = int(key.partition("/")[0])
        if wanted < self._j or self._j < 0:
            self._j, self._layers = -1, read_layers(self._source)
        while self._j < wanted:
            self._j, layer = next(self._layers)
            self._found = {
                f"{self._j}/{tensor.name}/{i}": matrix
                for tensor in matrix_tensors(layer)
                for i, matrix in enumerate(tensor.values(self._j, layer))
            }
        return self._found[key]

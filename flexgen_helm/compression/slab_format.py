"""Slabs of compressed weights: what is stored of each matrix, and all other tensors in the smallest dtype that holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexgen_helm.compression.matrices import MatrixTensor
from flexgen_helm.compression.scheme import Parts, Scheme
from flexgen_helm.compression.threads import in_threads
from flexgen_helm.memory.buffers import padded
from flexgen_helm.memory.slab import ALIGNMENT, SlabLayout, SlabTensor, named_tensors

SEPARATOR = "/"
"""Between the name of a tensor, the number of a matrix in it, and the name of a part; no name of a module has it."""
SMALLER = (torch.bfloat16, torch.float16)
"""Dtypes in which fp32 tensors are stored if every value survives."""


@dataclass(frozen=True)
class CompressedSlab:
    """Format of a unit whose matrices are quantised. Its bound slab is that of the uncompressed unit.

    Attributes:
        stored: Layout of the stored slab.
        bound: Layout of the bound slab.
        scheme: Scheme of the matrices.
        matrices: Tensors that hold matrices, by name.
    """

    stored: SlabLayout
    bound: SlabLayout
    scheme: Scheme
    matrices: Mapping[str, MatrixTensor]

    @property
    def carried(self) -> SlabLayout:
        """Layout of the carried slab, equal to the stored one."""
        return self.stored

    @property
    def is_coded(self) -> bool:
        """No."""
        return False

    @property
    def is_packed(self) -> bool:
        """Yes."""
        return True

    @property
    def matrix_bytes(self) -> int:
        """Bytes of everything that is stored of the matrices, without what aligns them."""
        return sum(x.num_bytes for x in self.stored.tensors if x.names[0].partition(SEPARATOR)[0] in self.matrices)

    @property
    def num_weights(self) -> int:
        """Number of the matrices' weights."""
        return sum(x.num_bytes // x.dtype.itemsize for x in self.bound.tensors if x.names[0] in self.matrices)

    def decode(self, stored: Tensor, carried: Tensor) -> None:
        """Refuse: the stored slab is the carried one."""
        raise AssertionError("slabs of a fixed layout are not coded")

    def load(self, stored: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a stored one, both on the CPU."""
        self.unpack(stored, bound)

    def unpack(self, stored: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a stored one, both uint8 on the device."""
        parts: dict[str, dict[str, Parts]] = {}
        for place in self.stored.tensors:
            name, number, part = place.names[0].split(SEPARATOR)
            parts.setdefault(name, {}).setdefault(number, {})[part] = place.view(stored)
        work: list[tuple[Parts, Tensor]] = []
        for target in self.bound.tensors:
            found, value = parts[target.names[0]], target.view(bound)
            if target.names[0] in self.matrices:
                matrices = self.matrices[target.names[0]].matrices(value)
                work += [(found[str(i)], matrix) for i, matrix in enumerate(matrices)]
            else:
                value.copy_(found["0"]["plain"])
        in_threads(self._unpack_matrix, work, most=1 if bound.is_cuda else None)

    def _unpack_matrix(self, matrix: tuple[Parts, Tensor]) -> None:
        parts, target = matrix
        if target.stride(1) == 1:
            self.scheme.unpack(parts, target)
        else:
            rows = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            self.scheme.unpack(parts, rows)
            target.copy_(rows)


def stored_tensors(module: nn.Module, packed: Mapping[str, list[Parts]]) -> dict[str, Tensor]:
    """Return all stored tensors of a unit by their names in the slab.

    Args:
        module: The unit, filled with its weights.
        packed: For each tensor that holds matrices what is stored of each of them.
    """
    found: dict[str, Tensor] = {}
    for (name, *_), tensor in named_tensors(module):
        matrices = packed.get(name, [{"plain": _smallest(tensor.detach())}])
        found |= {SEPARATOR.join((name, str(i), part)): x for i, parts in enumerate(matrices) for part, x in parts.items()}
    return found


def layout_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> SlabLayout:
    """Return a layout with tensors in order."""
    offset, places = 0, []
    for name, tensor in tensors:
        places.append(SlabTensor((name,), tensor.dtype, tuple(tensor.shape), offset))
        offset += -(-places[-1].num_bytes // ALIGNMENT) * ALIGNMENT
    return SlabLayout(tuple(places), padded(offset))


def _smallest(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32:
        for dtype in SMALLER:
            if torch.equal(tensor.to(dtype).float(), tensor):
                return tensor.to(dtype)
    return tensor

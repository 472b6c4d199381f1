"""Slabs of compressed weights: what is stored of each matrix, and all other tensors in the smallest dtype that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from flexgen_helm.compression.matrices import MatrixTensor
from flexgen_helm.compression.scheme import CodedScheme, Parts, Scheme
from flexgen_helm.compression.schemes import EntropyCoded
from flexgen_helm.machine.threads import in_threads
from flexgen_helm.memory.amounts import padded
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

    def unpack(self, carried: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a carried one, both uint8 on the device."""
        self._fill(_parts(self.carried, carried), bound, self.scheme.unpack)

    def load(self, stored: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a stored one, both on the CPU."""
        self.unpack(stored, bound)

    def _fill(self, parts: Mapping[str, Mapping[str, Parts]], bound: Tensor, compute: Callable[[Parts, Tensor], None]) -> None:
        """Compute the matrices of a bound slab, and copy everything else."""

        def fill(matrix: tuple[Parts, Tensor]) -> None:
            found, target = matrix
            if target.stride(1) == 1:
                compute(found, target)
            else:
                rows = torch.empty(target.shape, dtype=target.dtype, device=target.device)
                compute(found, rows)
                target.copy_(rows)

        work: list[tuple[Parts, Tensor]] = []
        for target in self.bound.tensors:
            found, value = parts[target.names[0]], target.view(bound)
            if target.names[0] in self.matrices:
                work += [(found[str(i)], matrix) for i, matrix in enumerate(self.matrices[target.names[0]].matrices(value))]
            else:
                value.copy_(found["0"]["plain"])
        in_threads(fill, work, most=1 if bound.is_cuda else None)


@dataclass(frozen=True)
class CodedSlab(CompressedSlab):
    """Format of a unit whose quantised matrices are coded: on the way to a device they are integers of a byte each."""

    scheme: CodedScheme

    @cached_property
    def carried(self) -> SlabLayout:
        """Layout of the carried slab: other tensors of the matrices, all else as it is stored."""
        stored, bound = (torch.empty(x.num_bytes, dtype=torch.uint8, device="meta") for x in (self.stored, self.bound))
        shapes: dict[str, torch.Size] = {}
        for place in self.bound.tensors:
            if place.names[0] in self.matrices:
                shapes[place.names[0]] = self.matrices[place.names[0]].matrices(place.view(bound)).shape
        found: dict[str, Tensor] = {}
        for name, numbers in _parts(self.stored, stored).items():
            for number, parts in numbers.items():
                kept = self.scheme.carried(parts, (shapes[name][1], shapes[name][2])) if name in shapes else parts
                found |= {SEPARATOR.join((name, number, part)): x for part, x in kept.items()}
        return layout_of_tensors(found.items())

    @property
    def is_coded(self) -> bool:
        """Yes."""
        return True

    def decode(self, stored: Tensor, carried: Tensor) -> None:
        """Fill a carried slab from a stored one, both on the CPU, in several threads.

        Raises:
            CorruptFile: If a frame is damaged.
        """
        found, work = _parts(self.stored, stored), []
        for name, numbers in _parts(self.carried, carried).items():
            for number, target in numbers.items():
                if name in self.matrices:
                    work.append((found[name][number], target))
                else:
                    target["plain"].copy_(found[name][number]["plain"])
        in_threads(lambda matrix: self.scheme.decode(*matrix), work)

    def load(self, stored: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a stored one, both on the CPU.

        Raises:
            CorruptFile: If a frame is damaged.
        """
        self._fill(_parts(self.stored, stored), bound, self.scheme.load)


def compressed_slab(
    stored: SlabLayout, bound: SlabLayout, scheme: Scheme | CodedScheme, matrices: Mapping[str, MatrixTensor]
) -> CompressedSlab:
    """Return the format of a unit whose matrices are quantised."""
    if isinstance(scheme, EntropyCoded):
        return CodedSlab(stored, bound, scheme, matrices)
    return CompressedSlab(stored, bound, scheme, matrices)


def _parts(layout: SlabLayout, memory: Tensor) -> dict[str, dict[str, Parts]]:
    """Return views of a slab's tensors by the tensor of the unit, the number of the matrix in it, and the name of the part."""
    parts: dict[str, dict[str, Parts]] = {}
    for place in layout.tensors:
        name, number, part = place.names[0].split(SEPARATOR)
        parts.setdefault(name, {}).setdefault(number, {})[part] = place.view(memory)
    return parts


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

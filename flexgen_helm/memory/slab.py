"""A module's weights as one contiguous slab: the form in which it is stored, and the form that its parameters are views of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexgen_helm.memory.buffers import padded

ALIGNMENT = 256
"""Bytes at whose multiples tensors begin, as torch's own GPU allocator has it."""


@dataclass(frozen=True)
class SlabTensor:
    """A tensor within a slab."""

    names: tuple[str, ...]
    """Where it stands in the module: several places where weights are tied."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Its first byte, from the beginning of the slab."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor itself."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """The tensor in a slab."""
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class SlabLayout:
    """Where a module's parameters and persistent buffers lie in its slab."""

    tensors: tuple[SlabTensor, ...]
    num_bytes: int
    """Whole pages."""

    def to_json(self) -> dict[str, Any]:
        """The layout as plain data."""
        tensors = [[list(t.names), str(t.dtype).removeprefix("torch."), list(t.shape), t.offset] for t in self.tensors]
        return {"num_bytes": self.num_bytes, "tensors": tensors}


def layout_of(module: nn.Module) -> SlabLayout:
    """Lay out a module's parameters and persistent buffers one behind the other; they may be on the meta device."""
    offset, tensors = 0, []
    for names, tensor in _tensors(module):
        found = SlabTensor(names, tensor.dtype, tuple(tensor.shape), offset)
        tensors.append(found)
        offset += -(-found.num_bytes // ALIGNMENT) * ALIGNMENT
    return SlabLayout(tuple(tensors), padded(offset))


def pack(module: nn.Module, layout: SlabLayout, memory: Tensor) -> None:
    """Copy a module's tensors into a slab (uint8 ``[at least layout.num_bytes]``)."""
    with torch.no_grad():
        for place, (_, tensor) in zip(layout.tensors, _tensors(module), strict=True):
            place.view(memory).copy_(tensor)


class SlabFormat(Protocol):
    """How a module's parameters and persistent buffers become a stored slab, and how they come back.

    The stored slab lies on a tier, is checksummed on disk, and travels over links. The module's parameters are views of the
    bound slab. Scales, maps and codes of a compressed format are tensors of its stored layout.
    """

    @property
    def stored(self) -> SlabLayout:
        """Layout of the stored slab."""

    @property
    def bound(self) -> SlabLayout:
        """Layout of the bound slab."""

    @property
    def in_place(self) -> bool:
        """Whether the stored slab can be bound as it is, so that `unpack` is never called."""

    def pack(self, module: nn.Module, stored: Tensor) -> None:
        """Write the module's tensors into a stored slab: uint8 ``[at least stored.num_bytes]`` on the CPU."""

    def unpack(self, stored: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a stored one, both uint8 on the device; runs in the thread and stream of the copies."""


@dataclass(frozen=True)
class Plain:
    """Weights as they are: the stored slab is the bound slab."""

    bound: SlabLayout

    @classmethod
    def of(cls, module: nn.Module) -> Plain:
        """Return the format of a module, which may be on the meta device."""
        return cls(layout_of(module))

    @property
    def stored(self) -> SlabLayout:
        """The bound layout."""
        return self.bound

    @property
    def in_place(self) -> bool:
        """Always."""
        return True

    def pack(self, module: nn.Module, stored: Tensor) -> None:
        """Copy the module's tensors one behind the other."""
        pack(module, self.bound, stored)

    def unpack(self, stored: Tensor, bound: Tensor) -> None:
        """Copy the slab; the runtime binds the stored one instead."""
        bound[: self.bound.num_bytes].copy_(stored[: self.bound.num_bytes], non_blocking=True)


class Binding:
    """Points a module's parameters and persistent buffers at slabs."""

    def __init__(self, module: nn.Module, layout: SlabLayout) -> None:
        """Find the places; the module keeps its submodules from now on."""
        self.layout = layout
        self._places = [(tensor, [_owner(module, name) for name in tensor.names]) for tensor in layout.tensors]

    def bind(self, memory: Tensor) -> None:
        """Make them views of a slab (uint8 ``[at least layout.num_bytes]``), on whatever device it is."""
        for tensor, places in self._places:
            self._set(places, tensor.view(memory))

    def to_meta(self) -> None:
        """Leave them without values."""
        for tensor, places in self._places:
            self._set(places, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def _set(self, places: list[tuple[dict[str, Any], str, bool]], value: Tensor) -> None:
        parameter = nn.Parameter(value, requires_grad=False) if any(is_parameter for *_, is_parameter in places) else value
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers makes it anew
        for owner, name, is_parameter in places:
            owner[name] = parameter if is_parameter else value


def _owner(module: nn.Module, path: str) -> tuple[dict[str, Any], str, bool]:
    """The dictionary in which a tensor stands, its key, and whether it is a parameter."""
    prefix, _, name = path.rpartition(".")
    owner = module.get_submodule(prefix)
    is_parameter = name in owner._parameters
    return (owner._parameters if is_parameter else owner._buffers), name, is_parameter


def _tensors(module: nn.Module) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """A module's parameters and persistent buffers, each once with all its names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        yield tuple(names[key]), tensor

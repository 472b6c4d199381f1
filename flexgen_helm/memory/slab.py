"""Slabs: a module's weights as contiguous memory, in the form that is stored and in the form that its parameters view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexgen_helm.memory.buffers import padded

ALIGNMENT = 256
"""Bytes: each tensor begins at a multiple of it, as in torch's own GPU allocator."""


@dataclass(frozen=True)
class SlabTensor:
    """A tensor within a slab."""

    names: tuple[str, ...]
    """Names of the tensor in the module; several if weights are tied."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Offset in bytes from the beginning of the slab."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor without padding."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """Return the tensor as a view of a slab (uint8)."""
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class SlabLayout:
    """Layout of a slab: the offset of each parameter and persistent buffer of a module."""

    tensors: tuple[SlabTensor, ...]
    num_bytes: int
    """Bytes of the slab, in whole pages."""

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain data for JSON."""
        tensors = [[list(t.names), str(t.dtype).removeprefix("torch."), list(t.shape), t.offset] for t in self.tensors]
        return {"num_bytes": self.num_bytes, "tensors": tensors}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> SlabLayout:
        """Return the layout that `to_json` described."""
        tensors = [SlabTensor(tuple(n), getattr(torch, dtype), tuple(shape), at) for n, dtype, shape, at in found["tensors"]]
        return cls(tuple(tensors), found["num_bytes"])


def layout_of(module: nn.Module) -> SlabLayout:
    """Return a layout with a module's parameters and persistent buffers in order; they may be on the meta device."""
    offset, tensors = 0, []
    for names, tensor in named_tensors(module):
        found = SlabTensor(names, tensor.dtype, tuple(tensor.shape), offset)
        tensors.append(found)
        offset += -(-found.num_bytes // ALIGNMENT) * ALIGNMENT
    return SlabLayout(tuple(tensors), padded(offset))


def pack(module: nn.Module, layout: SlabLayout, memory: Tensor) -> None:
    """Copy a module's tensors into a slab (uint8 ``[at least layout.num_bytes]``)."""
    with torch.no_grad():
        for place, (_, tensor) in zip(layout.tensors, named_tensors(module), strict=True):
            place.view(memory).copy_(tensor)


class SlabFormat(Protocol):
    """A form of stored weights: packs a module's parameters and persistent buffers into a stored slab and unpacks them.

    The stored slab is kept on a tier, is checksummed on disk, and is copied over links. The module's parameters are views of
    the bound slab. Scales, maps and codes of a compressed format are tensors of its stored layout.
    """

    @property
    def stored(self) -> SlabLayout:
        """Layout of the stored slab."""

    @property
    def bound(self) -> SlabLayout:
        """Layout of the bound slab."""

    @property
    def in_place(self) -> bool:
        """Whether parameters can be views of the stored slab itself, so that `unpack` is never called."""

    def pack(self, module: nn.Module, stored: Tensor) -> None:
        """Write the module's tensors into a stored slab: uint8 ``[at least stored.num_bytes]`` on the CPU."""

    def unpack(self, stored: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a stored slab, both uint8 on the device; called in the thread and stream of the link."""


@dataclass(frozen=True)
class Plain:
    """Format of uncompressed weights: the stored slab is the bound slab."""

    bound: SlabLayout

    @classmethod
    def of(cls, module: nn.Module) -> Plain:
        """Return the format of a module, which may be on the meta device."""
        return cls(layout_of(module))

    @property
    def stored(self) -> SlabLayout:
        """Layout of the stored slab, equal to the bound one."""
        return self.bound

    @property
    def in_place(self) -> bool:
        """Whether parameters can be views of the stored slab: always."""
        return True

    def pack(self, module: nn.Module, stored: Tensor) -> None:
        """Copy the module's tensors into a stored slab in order."""
        pack(module, self.bound, stored)

    def unpack(self, stored: Tensor, bound: Tensor) -> None:
        """Copy the slab. The runtime never calls it, because it binds the stored slab."""
        bound[: self.bound.num_bytes].copy_(stored[: self.bound.num_bytes], non_blocking=True)


class Binding:
    """Points a module's parameters and persistent buffers at slabs."""

    def __init__(self, module: nn.Module, layout: SlabLayout) -> None:
        """Find the module's tensors. Its submodules must not be replaced afterwards."""
        self.layout = layout
        self._places = [(tensor, [_owner(module, name) for name in tensor.names]) for tensor in layout.tensors]

    def bind(self, memory: Tensor) -> None:
        """Make the parameters and buffers views of a slab (uint8 ``[at least layout.num_bytes]``) on any device."""
        for tensor, places in self._places:
            self._set(places, tensor.view(memory))

    def to_meta(self) -> None:
        """Put the parameters and buffers on the meta device, without values."""
        for tensor, places in self._places:
            self._set(places, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def _set(self, places: list[tuple[dict[str, Any], str, bool]], value: Tensor) -> None:
        parameter = nn.Parameter(value, requires_grad=False) if any(is_parameter for *_, is_parameter in places) else value
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers initialises it again
        for owner, name, is_parameter in places:
            owner[name] = parameter if is_parameter else value


def _owner(module: nn.Module, path: str) -> tuple[dict[str, Any], str, bool]:
    """Return the dictionary that holds a tensor, its key there, and whether it is a parameter."""
    prefix, _, name = path.rpartition(".")
    owner = module.get_submodule(prefix)
    is_parameter = name in owner._parameters
    return (owner._parameters if is_parameter else owner._buffers), name, is_parameter


def named_tensors(module: nn.Module) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield a module's parameters and persistent buffers, each once with all its names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        yield tuple(names[key]), tensor

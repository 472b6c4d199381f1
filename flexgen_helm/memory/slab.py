"""Slabs: a module's weights as contiguous memory, in the forms that are stored, carried over a link and bound to parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexgen_helm.memory.amounts import padded

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
    """Three forms of a unit's weights, of which neighbours may be the same.

    The **stored** slab is kept on the disk, where it has a checksum, and in host memory. The **carried** one is what a link
    brings to a device with a memory of its own, and what is kept there. The module's parameters are views of the **bound**
    one. Scales, maps and codes of a compressed format are tensors of its stored and carried layouts.

    On a device with a memory of its own the CPU decodes stored slabs and the device unpacks carried ones. On a CPU a stored
    slab is loaded in one step. All three methods are called in the thread and stream of a link; all slabs are uint8 and may be
    longer than their layouts.
    """

    @property
    def stored(self) -> SlabLayout:
        """Layout of the stored slab."""

    @property
    def carried(self) -> SlabLayout:
        """Layout of the carried slab."""

    @property
    def bound(self) -> SlabLayout:
        """Layout of the bound slab."""

    @property
    def is_coded(self) -> bool:
        """Whether the stored form is not the carried one; if not, `decode` is never called."""

    @property
    def is_packed(self) -> bool:
        """Whether the carried form is not the bound one; if not, `unpack` is never called."""

    def decode(self, stored: Tensor, carried: Tensor) -> None:
        """Fill a carried slab from a stored slab, both on the CPU.

        Raises:
            CorruptFile: If the stored slab is damaged.
        """

    def unpack(self, carried: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a carried slab, both on the device."""

    def load(self, stored: Tensor, bound: Tensor) -> None:
        """Fill a bound slab from a stored slab, both on the CPU; never called if all forms are the same.

        Raises:
            CorruptFile: If the stored slab is damaged.
        """


def in_place(form: SlabFormat) -> bool:
    """Return whether parameters can be views of the stored slab itself."""
    return not form.is_coded and not form.is_packed


@dataclass(frozen=True)
class Plain:
    """Format of uncompressed weights: all three forms are the same, so that nothing is ever converted."""

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
    def carried(self) -> SlabLayout:
        """Layout of the carried slab, equal to the bound one."""
        return self.bound

    @property
    def is_coded(self) -> bool:
        """No."""
        return False

    @property
    def is_packed(self) -> bool:
        """No."""
        return False

    def decode(self, stored: Tensor, carried: Tensor) -> None:
        """Refuse: the stored slab is the carried one."""
        raise AssertionError("plain slabs are not coded")

    def unpack(self, carried: Tensor, bound: Tensor) -> None:
        """Refuse: the carried slab is the bound one."""
        raise AssertionError("plain slabs are not packed")

    def load(self, stored: Tensor, bound: Tensor) -> None:
        """Refuse: the stored slab is the bound one."""
        raise AssertionError("parameters view plain slabs")


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

"""Weight store: brings the weights of each layer to the device when they are needed (FlexGen section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flexgen_helm.memory.allocator import LARGE_TENSOR_MAPS
from flexgen_helm.memory.carrier import Carrier, device_memory
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.link import Link, Transfer
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.read_ahead import ReadAhead, SlabSource
from flexgen_helm.memory.slab import Binding, SlabFormat, in_place
from flexgen_helm.memory.spans.span import Activity
from flexgen_helm.types import Tier

EMPTY = -1
"""Number of a unit that no slot holds: the embeddings are never streamed."""


@dataclass(frozen=True)
class Unit:
    """A layer or the output head whose weights are streamed: they are loaded for every use."""

    binding: Binding
    format: SlabFormat
    memory: Tensor | None
    """Slab in memory: the stored one on the host, the carried one on a device with a memory of its own; None: on disk."""
    on_device: bool = False
    """Whether the memory is that of a device of its own."""


@dataclass(eq=False)
class _Slot:
    memory: Tensor
    j: int = EMPTY
    arriving: Transfer | None = None
    taken: bool = False


class WeightStore:
    """Streams weights to the device: a few units at a time have their parameters bound.

    If the device has a memory of its own, a slab is copied as a whole into one of a few static slots; if it is packed, it is
    copied beside them and unpacked into one, and if it is coded, it is decoded into a host buffer first. If the device has
    none, parameters are views of the stored slab, and a slab on disk is read into a host buffer; a slab that cannot be used in
    place is loaded into a slot there too.
    """

    def __init__(
        self,
        units: Mapping[int, Unit],
        *,
        device: Device,
        num_slots: int,
        source: SlabSource | None,
        meter: Meter,
    ) -> None:
        """Allocate the slots.

        Args:
            units: Streamed units by layer number; the output head has the number after the last layer.
            device: The device that computes.
            num_slots: Streamed units on the device at a time.
            source: Source of the slabs on disk; None if there are none.
            meter: Measures the transfers.
        """
        self._meter, self._source = meter, source
        self.streamed = frozenset(units)
        """Layer numbers of the units that must be loaded before they are used."""
        self.num_slots = min(num_slots, len(units))
        self._units = dict(units)
        self._disk = _read_ahead(units, device, num_slots, source, meter)
        self._carrier: Carrier | None = None
        if device.own_memory:
            self._carrier = Carrier([unit.format for unit in units.values() if not unit.on_device], device, meter)
        self._slots: list[_Slot] = []
        self._link: Link | None = None
        if units and (device.own_memory or not all(in_place(unit.format) for unit in units.values())):
            largest = max(unit.format.bound.num_bytes for unit in units.values())
            self._slots = [_Slot(device_memory(largest, device)) for _ in range(self.num_slots)]
            self._link = Link(device.torch_device, "weights")
            meter.hold("device", "slots", largest * self.num_slots)
        _hold(units, meter)
        self._maps_large_tensors = not device.is_gpu
        if self._maps_large_tensors:
            LARGE_TENSOR_MAPS.begin()

    def begin(self, j: int) -> None:
        """Start to load unit j, unless it is loaded or being loaded."""
        if self._link is None:
            if self._disk is not None and self._units[j].memory is None:
                self._disk.start(j)
            return
        slot = self._slot(j)
        if slot is None:
            slot = min((slot for slot in self._slots if not slot.taken), key=lambda slot: slot.j != EMPTY)
            slot.j, slot.arriving = j, self._link.submit(partial(self._fill, slot.memory, j))
        slot.taken = True

    def finish(self, j: int) -> None:
        """Wait until unit j is loaded.

        Raises:
            CorruptFile: If its slab cannot be read or is torn.
        """
        self._memory(j)

    def use(self, j: int) -> None:
        """Wait for unit j and make its module's parameters views of it; they are valid until `release`."""
        self._units[j].binding.bind(self._memory(j))

    def release(self, j: int) -> None:
        """Free the slot or buffer of unit j for another unit."""
        slot = self._slot(j)
        if slot is not None:
            slot.taken = False
        elif self._disk is not None and self._units[j].memory is None:
            self._disk.free(j)

    def release_all(self) -> None:
        """Free all slots and buffers and forget their content, after a sweep was given up."""
        for slot in self._slots:
            slot.j, slot.taken = EMPTY, False
        if self._link is None and self._disk is not None:
            self._disk.forget_all()

    def close(self) -> None:
        """Stop loading and close the source of slabs; a second call does nothing."""
        if self._maps_large_tensors:
            self._maps_large_tensors = False
            LARGE_TENSOR_MAPS.end()
        if self._link is not None:
            self._link.close()
        if self._source is not None:
            self._source.close()

    def _memory(self, j: int) -> Tensor:
        self.begin(j)
        slot = self._slot(j)
        if slot is not None:
            assert slot.arriving is not None
            try:
                slot.arriving.wait()
            except BaseException:
                slot.j, slot.taken = EMPTY, False
                raise
            return slot.memory
        memory = self._units[j].memory
        if memory is None:
            assert self._disk is not None
            memory = self._disk.take(j)
        return memory

    def _slot(self, j: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.j == j), None)

    def _fill(self, target: Tensor, j: int) -> None:
        """Load slab j into a slot, and start to read the next slabs from disk as soon as its buffer is free."""
        unit = self._units[j]
        stored = self._take(j) if unit.memory is None else unit.memory
        if unit.on_device:
            with self._meter.span("unpack", Activity("unpack_weights", str(j))):
                unit.format.unpack(stored, target)
            return
        if self._carrier is None:
            with self._meter.span("unpack", Activity("unpack_weights", str(j))):
                unit.format.load(stored, target)
        elif unit.format.is_coded:
            carried = self._carrier.decode(unit.format, stored, j)
            self._read_on(j)
            self._carrier.carry(unit.format, carried, target, j)
            return
        else:
            self._carrier.carry(unit.format, stored, target, j)
            if target.is_cuda and unit.memory is None:
                torch.cuda.current_stream(target.device).synchronize()
        self._read_on(j)

    def _take(self, j: int) -> Tensor:
        assert self._disk is not None
        self._disk.free_all()  # slabs in them may be for a sweep that was given up, or in another order
        self._disk.start_from(j)
        return self._disk.take(j)

    def _read_on(self, j: int) -> None:
        """Give back the buffer of slab j, if it is on disk."""
        if self._units[j].memory is None:
            assert self._disk is not None
            self._disk.free(j)
            self._disk.start_behind(j)


def _read_ahead(
    units: Mapping[int, Unit], device: Device, num_slots: int, source: SlabSource | None, meter: Meter
) -> ReadAhead | None:
    """Return buffers for the slabs on disk; None if there are none."""
    sizes = {j: unit.format.stored.num_bytes for j, unit in sorted(units.items()) if unit.memory is None}
    if not sizes:
        return None
    assert source is not None
    pin = device.is_gpu and not all(units[j].format.is_coded for j in sizes)
    return ReadAhead(source, sizes, num_buffers=min(num_slots, len(sizes)), pin=pin, meter=meter)


def _hold(units: Mapping[int, Unit], meter: Meter) -> None:
    """Record the memory of the slabs themselves."""
    held: dict[Tier, int] = {"device": 0, "host": 0, "disk": 0}
    for unit in units.values():
        if unit.on_device:
            held["device"] += unit.format.carried.num_bytes
        else:
            held["disk" if unit.memory is None else "host"] += unit.format.stored.num_bytes
    for tier, count in held.items():
        meter.hold(tier, "weights", count)

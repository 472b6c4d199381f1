"""Weight store: brings the weights of each layer to the device when they are needed (FlexGen section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flexgen_helm.memory.allocator import LARGE_TENSOR_MAPS
from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.link import Link, Transfer
from flexgen_helm.memory.meter import Activity, Meter
from flexgen_helm.memory.read_ahead import ReadAhead, SlabSource
from flexgen_helm.memory.slab import Binding, SlabFormat


@dataclass(frozen=True)
class Unit:
    """A layer or the output head whose weights are streamed: they are loaded for every use."""

    binding: Binding
    format: SlabFormat
    memory: Tensor | None
    """Stored slab in memory; None if it is on disk."""


@dataclass(eq=False)
class _Slot:
    memory: Tensor
    j: int = -1
    arriving: Transfer | None = None
    taken: bool = False


class WeightStore:
    """Streams weights to the device: a few units at a time have their parameters bound.

    If the device has a memory of its own, a slab is copied as a whole into one of a few static slots. If not, parameters are
    views of the stored slab, and a slab on disk is read into a host buffer. A format that is not used in place needs slots on
    every device: its stored slab is copied, then unpacked into a slot.
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
        on_disk = {j: unit.format.stored.num_bytes for j, unit in sorted(units.items()) if unit.memory is None}
        self._disk: ReadAhead | None = None
        if on_disk:
            assert source is not None
            num_buffers = min(num_slots, len(on_disk))
            self._disk = ReadAhead(source, on_disk, num_buffers=num_buffers, pin=device.is_gpu, meter=meter)
        self._slots: list[_Slot] = []
        self._link: Link | None = None
        self._arrival: Tensor | None = None
        """Device memory in which a stored slab waits to be unpacked; one is enough, because transfers are sequential."""
        unpacked = [unit.format for unit in units.values() if not unit.format.in_place]
        if units and (device.own_memory or unpacked):
            largest = max(unit.format.bound.num_bytes for unit in units.values())
            self._slots = [_Slot(_device_memory(largest, device)) for _ in range(self.num_slots)]
            self._link = Link(device.torch_device, "weights")
            arrival = max((each.stored.num_bytes for each in unpacked), default=0) if device.own_memory else 0
            self._arrival = _device_memory(arrival, device) if arrival else None
            meter.hold("device", "slots", largest * self.num_slots + arrival)
        meter.hold("host", "weights", sum(unit.memory.nbytes for unit in units.values() if unit.memory is not None))
        meter.hold("disk", "weights", sum(on_disk.values()))
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
            slot = next(slot for slot in self._slots if not slot.taken)
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
            slot.j, slot.taken = -1, False
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
                slot.j, slot.taken = -1, False
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
        """Load slab j into a slot, then start to read the next slabs from disk."""
        memory = self._units[j].memory
        if memory is not None:
            self._bring(memory, target, j)
            return
        assert self._disk is not None
        self._disk.free_all()  # slabs in them may be for a sweep that was given up, or in another order
        self._disk.start_from(j)
        self._bring(self._disk.take(j), target, j)
        if target.is_cuda:
            torch.cuda.current_stream(target.device).synchronize()
        self._disk.free(j)
        self._disk.start_behind(j)

    def _bring(self, stored: Tensor, target: Tensor, j: int) -> None:
        """Copy a stored slab to the device, and unpack it there unless it is used in place."""
        form, count = self._units[j].format, self._units[j].format.stored.num_bytes
        arrival = target if form.in_place else self._arrival
        if arrival is not None:
            with self._meter.span("host_to_device", Activity("load_weights", str(j)), count):
                arrival[:count].copy_(stored[:count], non_blocking=True)
            stored = arrival
        if not form.in_place:
            with self._meter.span("unpack", Activity("unpack_weights", str(j))):
                form.unpack(stored, target)


def _device_memory(num_bytes: int, device: Device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device) if device.is_gpu else allocate(num_bytes)

"""Carrier: brings slabs to a device with a memory of its own, in the thread and stream of a link."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from flexgen_helm.memory.buffers import allocate
from flexgen_helm.memory.copies import copy_in_pieces
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.slab import SlabFormat
from flexgen_helm.memory.spans.span import Activity


class Carrier:
    """Decodes slabs on the CPU, copies them to the device and unpacks them there, one after the other."""

    def __init__(self, formats: Collection[SlabFormat], device: Device, meter: Meter) -> None:
        """Allocate the memory in which slabs wait.

        Args:
            formats: Formats of all slabs that will be carried.
            device: The device, which has a memory of its own.
            meter: Measures the copies.
        """
        self._meter = meter
        arrival = max((form.carried.num_bytes for form in formats if form.is_packed), default=0)
        decoded = max((form.carried.num_bytes for form in formats if form.is_coded), default=0)
        self._arrival = device_memory(arrival, device) if arrival else None
        """Device memory in which a carried slab waits to be unpacked."""
        self._decoded = allocate(decoded, pin=device.is_gpu) if decoded else None
        """Host memory in which a carried slab waits to be copied."""
        self._copied: torch.cuda.Event | None = None
        """The end of the last copy from there."""
        meter.hold("device", "arriving weights", arrival)
        meter.hold("host", "decoded weights", decoded)

    def decode(self, form: SlabFormat, stored: Tensor, j: int) -> Tensor:
        """Return the carried slab of unit j for its coded one; the next call overwrites it.

        Raises:
            CorruptFile: If the stored slab is damaged.
        """
        assert self._decoded is not None
        if self._copied is not None:
            self._copied.synchronize()  # not the stream, which also waits for the computation that has the next slot
        begin = self._meter.now()
        form.decode(stored, self._decoded)
        self._meter.add("unpack", Activity("unpack_weights", str(j)), begin, self._meter.now())
        return self._decoded

    def carry(self, form: SlabFormat, carried: Tensor, slot: Tensor, j: int) -> None:
        """Copy the carried slab of unit j to the device and fill a slot with its bound slab; on a GPU this ends later."""
        count, arrival = form.carried.num_bytes, self._arrival if form.is_packed else slot
        assert arrival is not None
        with self._meter.span("host_to_device", Activity("load_weights", str(j)), count):
            copy_in_pieces(arrival[:count], carried[:count])
        if carried is self._decoded and slot.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(slot.device))
        if form.is_packed:
            with self._meter.span("unpack", Activity("unpack_weights", str(j))):
                form.unpack(arrival, slot)


def device_memory(num_bytes: int, device: Device) -> Tensor:
    """Allocate memory of a device: uint8 ``[at least num_bytes]``."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device) if device.is_gpu else allocate(num_bytes)

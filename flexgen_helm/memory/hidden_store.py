"""Hidden states of a sweep's rows between two layers, stored on the tiers that the policy gives them."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flexgen_helm.errors import DISK_FULL_ERRNOS, CorruptFile, DiskFull
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.device import Device
from flexgen_helm.memory.direct_io import file_error
from flexgen_helm.memory.link import Link, Transfer
from flexgen_helm.memory.meter import Meter
from flexgen_helm.memory.spans.span import Activity
from flexgen_helm.memory.tiers import interleave
from flexgen_helm.types import TIERS, Resource, Shares, Tier


class _Storage(Protocol):
    """The place in which one row's hidden state is stored, and the resources that transfers to and from it keep busy."""

    tier: Tier
    writes: Resource
    reads: Resource

    def write(self, hidden: Tensor) -> None: ...

    def read(self, device: torch.device) -> Tensor: ...


class _Host:
    """A place in RAM: a tensor for each row."""

    tier: Tier = "host"
    writes: Resource = "device_to_host"
    reads: Resource = "host_to_device"

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def write(self, hidden: Tensor) -> None:
        if self._memory.shape != hidden.shape or self._memory.dtype != hidden.dtype:
            self._memory = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda)
        if hidden.is_cuda:
            hidden.record_stream(torch.cuda.current_stream(hidden.device))
        self._memory.copy_(hidden, non_blocking=True)

    def read(self, device: torch.device) -> Tensor:
        return torch.empty_like(self._memory, device=device).copy_(self._memory, non_blocking=True)


class _File:
    """One file for the rows of a sweep. It has no name, so the system deletes it with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.end = folder, 0
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise file_error(folder, error) from error

    def take(self, num_bytes: int) -> int:
        """Reserve bytes at the end of the file and return their offset."""
        self.end += num_bytes
        return self.end - num_bytes

    def write(self, offset: int, content: memoryview) -> None:
        while content:
            count = os.pwrite(self._file.fileno(), content, offset)
            content, offset = content[count:], offset + count

    def read(self, offset: int, content: memoryview) -> None:
        while content:
            count = os.preadv(self._file.fileno(), [content], offset)
            if not count:
                raise CorruptFile(f"Hidden states in {self.folder} are torn: they were not written as a whole.")
            content, offset = content[count:], offset + count

    def close(self) -> None:
        self._file.close()


class _Disk:
    """A place on disk: a part of the file."""

    tier: Tier = "disk"
    writes: Resource = "disk_write"
    reads: Resource = "disk_read"

    def __init__(self, file: _File) -> None:
        self._file, self._offset = file, -1
        self._form = torch.empty(0)

    def write(self, hidden: Tensor) -> None:
        stored = hidden.cpu().contiguous()
        if self._offset < 0:  # a row's hidden state keeps its size
            self._offset = self._file.take(stored.nbytes)
        self._form = stored.new_empty(1).expand(stored.shape)
        try:
            self._file.write(self._offset, _bytes_of(stored))
        except OSError as error:
            if error.errno not in DISK_FULL_ERRNOS:
                raise file_error(self._file.folder, error) from error
            raise DiskFull(
                f"The hidden states of a row ({gib(stored.nbytes)}, behind {gib(self._offset)} of other rows) could not be "
                f"written into {self._file.folder} ({error}). Free space there, give another offload_folder, or set "
                "hidden=(1, 0, 0) in the policy."
            ) from error

    def read(self, device: torch.device) -> Tensor:
        stored = torch.empty(self._form.shape, dtype=self._form.dtype)
        try:
            self._file.read(self._offset, _bytes_of(stored))
        except OSError as error:
            raise file_error(self._file.folder, error) from error
        return stored.to(device)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class HiddenStore:
    """Stores each row's hidden state between two layers, on device, host or disk, and brings it back for the next layer."""

    def __init__(self, shares: Shares, *, device: Device, folder: Path, meter: Meter) -> None:
        """Allocate nothing before the first sweep.

        Args:
            shares: Shares of the rows that are stored on each tier.
            device: The device that computes. If it has no memory of its own, hidden states on the host are used in place.
            folder: Folder of the file for hidden states on disk.
            meter: Measures the transfers.
        """
        self._meter = meter
        self._shares, self._folder = shares, folder
        self._device, self._own_memory = device.torch_device, device.own_memory
        self._places: dict[int, _Storage] = {}
        self._kept: dict[int, Tensor] = {}
        self._sizes: dict[int, int] = {}
        self._held = dict.fromkeys(TIERS, 0)
        self._leaving: dict[int, Transfer] = {}
        self._arriving: dict[int, tuple[Transfer, list[Tensor]]] = {}
        self._link: Link | None = None
        self._file: _File | None = None

    def begin_sweep(self, num_rows: int) -> None:
        """Forget the last sweep and choose a tier for each row.

        Args:
            num_rows: Rows of the sweep that begins.
        """
        for content in (self._places, self._kept, self._sizes, self._leaving, self._arriving):
            content.clear()
        self._held = dict.fromkeys(TIERS, 0)
        if self._file is not None:
            self._file.end = 0
        for k, tier in enumerate(interleave([1] * num_rows, self._shares)):
            if tier == "disk":
                self._file = self._file or _File(self._folder)
                self._places[k] = _Disk(self._file)
            elif tier == "host" and self._own_memory:
                self._places[k] = _Host()
        if self._places and self._link is None:
            self._link = Link(self._device, "hidden")

    def store(self, k: int, hidden: Tensor) -> Transfer | None:
        """Start to store the hidden state of row k; return None if it stays where it is."""
        if k not in self._places:
            self._kept[k] = hidden
            return None
        assert self._link is not None
        tier = self._places[k].tier
        if k not in self._sizes:
            self._sizes[k] = hidden.nbytes
            self._held[tier] += hidden.nbytes
            self._meter.hold(tier, "hidden", self._held[tier])
        self._leaving[k] = self._link.submit(partial(self._write, self._places[k], k, hidden))
        return self._leaving[k]

    def load(self, k: int) -> Transfer | None:
        """Start to bring the hidden state of row k to the device; return None if it never left."""
        if k not in self._leaving:
            return None
        assert self._link is not None
        target: list[Tensor] = []
        transfer = self._link.submit(partial(self._read, self._places[k], k, target))
        self._arriving[k] = transfer, target
        return transfer

    def take(self, k: int) -> Tensor:
        """Wait for the hidden state of row k and return it on the device.

        Raises:
            DiskFull: If there was no space to store it.
            CorruptFile: If the file ends too early.
        """
        if k in self._kept:
            return self._kept.pop(k)
        transfer, target = self._arriving.pop(k)
        with self._meter.waiting():
            self._leaving.pop(k).wait()
            transfer.wait()
        if target[0].is_cuda:
            target[0].record_stream(torch.cuda.current_stream(self._device))
        return target[0]

    def _write(self, place: _Storage, k: int, hidden: Tensor) -> None:
        with self._meter.span(place.writes, Activity("store_hidden", str(k)), hidden.nbytes):
            place.write(hidden)

    def _read(self, place: _Storage, k: int, target: list[Tensor]) -> None:
        with self._meter.span(place.reads, Activity("load_hidden", str(k)), self._sizes.get(k, 0)):
            target.append(place.read(self._device))

    def close(self) -> None:
        """Stop copying and drop all hidden states."""
        if self._link is not None:
            self._link.close()
        if self._file is not None:
            self._file.close()
        self._places.clear()

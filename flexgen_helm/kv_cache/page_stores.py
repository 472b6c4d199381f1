"""Storage of pages: in tensors that grow, in host memory, or in a file on disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flexgen_helm.errors import DiskFull
from flexgen_helm.kv_cache.cargo import Cargo, ValueRows, as_rows
from flexgen_helm.kv_cache.page_format import CacheKey, MeanPart, PageFormat, PageTensors, PartFormat, PartName
from flexgen_helm.kv_cache.pages import TRANSFER_BYTES, grown
from flexgen_helm.memory.amounts import gib, padded
from flexgen_helm.memory.block_reader import BlockReader
from flexgen_helm.memory.direct_io import DirectFile, DiskIO
from flexgen_helm.memory.usage import free_disk_bytes

HOST = torch.device("cpu")


class GrowingPages:
    """Tensors of one kind of pages, which may grow with the highest number in use."""

    def __init__(self, capacity: int | None, *, grows: bool = True) -> None:
        """Nothing is allocated yet.

        Args:
            capacity: There will never be more pages; None: no bound.
            grows: Whether tensors begin small. On a GPU they would leave memory of every size that they had, which torch keeps.
        """
        self._capacity = capacity
        self.num_bytes = 0
        """Bytes of all tensors when all their pages are in use."""
        self._grows = grows or capacity is None
        self._pages = 0
        self._tensors: dict[tuple[CacheKey, PartName, PartFormat | MeanPart], Tensor] = {}

    def reserve(self, pages: int, limit: int | None = None) -> None:
        """Make room for pages numbered below this; tensors follow at their next use.

        Args:
            pages: Their number.
            limit: There are never more as long as any is in use; None: the capacity. A lower limit than the last one says that
                none was in use meanwhile.
        """
        limit = self._capacity if limit is None else limit
        if limit is not None and self._pages > limit:
            self._tensors.clear()
            self._pages = 0
        self._pages = limit if limit is not None and not self._grows else grown(self._pages, pages, limit)

    def tensors(self, key: CacheKey, page_format: PageFormat, device: torch.device) -> PageTensors:
        """K and V of the pages of one attention call, see `tensor`."""
        k, v = self.tensor(key, "k", page_format.k, device), self.tensor(key, "v", page_format.v, device)
        return PageTensors(page_format, k, v)

    def tensor(self, key: CacheKey, name: PartName, part: PartFormat | MeanPart, device: torch.device) -> Tensor:
        """A part of the pages of one attention call, made or made larger on a device where it is missing or too small."""
        old = self._tensors.get((key, name, part))
        if old is not None and len(old) >= self._pages:
            return old
        new = self._tensors[key, name, part] = part.allocate(self._pages, device)
        if old is not None:
            new[: len(old)] = old
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors.values())
        return new


class OffloadedPages(Protocol):
    """Pages that attention cannot read where they are stored: they travel as bytes.

    They are numbered from 0, the first page of their tier.
    """

    def register(self, key: CacheKey, page_format: PageFormat) -> None:
        """Make room for an attention call."""

    def transfer_bytes(self, cargo: Cargo) -> int:
        """Bytes of a page in a transfer."""

    def view(self, cargo: Cargo, buffer: Tensor, count: int) -> list[Tensor]:
        """The parts of the ``count`` pages of a transfer in a buffer of bytes."""

    def read(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Start to copy pages into a buffer of bytes; the futures say when they are there."""

    def write(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Start to copy pages out of a buffer of bytes; the futures say when they are stored."""

    def read_rows(self, rows: ValueRows, out: Tensor) -> int:
        """Copy rows of V into memory, uint8 ``[n, row_bytes]``; returns the bytes that were read from a disk."""

    def close(self) -> None:
        """Remove what there is."""


class HostPages(GrowingPages):
    """Pages in host memory. In transfers all K comes first, then all V."""

    def register(self, key: CacheKey, page_format: PageFormat) -> None:
        """Make room for an attention call."""
        self.tensors(key, page_format, HOST)

    def transfer_bytes(self, cargo: Cargo) -> int:
        """Bytes of a page in a transfer: its parts themselves."""
        return cargo.num_bytes

    def view(self, cargo: Cargo, buffer: Tensor, count: int) -> list[Tensor]:
        """The parts of the pages of a transfer in a buffer of bytes."""
        return cargo.stretches(buffer[: count * cargo.num_bytes], count)

    def read(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Copy pages into a buffer; nothing is left to wait for."""
        index = torch.tensor(pages)
        for stored, target in zip(self._stored(cargo), self.view(cargo, buffer, len(pages)), strict=True):
            torch.index_select(cargo.as_words(stored), 0, index, out=cargo.as_words(target))
        return []

    def write(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Copy pages out of a buffer; nothing is left to wait for."""
        index = torch.tensor(pages)
        for stored, source in zip(self._stored(cargo), self.view(cargo, buffer, len(pages)), strict=True):
            cargo.as_words(stored).index_copy_(0, index, cargo.as_words(source))
        return []

    def read_rows(self, rows: ValueRows, out: Tensor) -> int:
        """Copy rows of V into memory."""
        (stored,) = self._stored(Cargo(rows.key, rows.page_format, ("v",)))
        torch.index_select(as_rows(stored, rows.row_bytes), 0, rows.rows, out=out)
        return 0

    def close(self) -> None:
        """Do nothing: memory goes with its last use."""

    def _stored(self, cargo: Cargo) -> list[Tensor]:
        return [self._tensors[cargo.key, name, part] for name, part in zip(cargo.names, cargo.parts, strict=True)]


class DiskPages:
    """Pages in a file, a record for each page of each attention call, K before V.

    Where K and V travel apart, each has records of its own, so that no block of the file holds both.
    The file has no name, so that it is gone at `close`, or with the process.
    """

    def __init__(self, folder: Path, capacity: int, *, page_bytes: int) -> None:
        """Make the file.

        Args:
            folder: Where it goes.
            capacity: Pages that it may hold.
            page_bytes: Bytes of K and V of a page in all layers.

        Raises:
            DiskFull: If the folder has less room than that.
        """
        folder.mkdir(parents=True, exist_ok=True)
        free, needed = free_disk_bytes(folder), capacity * page_bytes
        if needed > free:
            raise DiskFull(
                f"The K/V cache needs {gib(needed)} in {folder}, which has {gib(free)} free. Free space, "
                "name another offload_folder, or give the disk a smaller share of the cache."
            )
        path = folder / f"kv_{os.getpid()}_{secrets.token_hex(4)}.pages"
        self._file = DirectFile(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        path.unlink()  # so that nothing stays, whatever ends the process
        self._file.path = folder  # which errors can name
        self._io, self._capacity = DiskIO(), capacity
        self._reader = BlockReader(self._file, self._io, num_bytes=TRANSFER_BYTES)
        self._begins: dict[tuple[CacheKey, PartName], int] = {}
        self._end = 0

    def register(self, key: CacheKey, page_format: PageFormat) -> None:
        """Make room for an attention call."""
        for record in _records(Cargo(key, page_format)):
            if (key, record.names[0]) not in self._begins:
                self._begins[key, record.names[0]] = self._end
                self._end += self._capacity * padded(record.num_bytes)

    def transfer_bytes(self, cargo: Cargo) -> int:
        """Bytes of a page's records, which direct access wants to be whole pages of memory."""
        return sum(padded(record.num_bytes) for record in _records(cargo))

    def view(self, cargo: Cargo, buffer: Tensor, count: int) -> list[Tensor]:
        """The parts of the pages of a transfer in a buffer of bytes."""
        found: list[Tensor] = []
        for record, stretch in _stretches(cargo, buffer, count):
            found += record.records(stretch.view(count, -1)[:, : record.num_bytes])
        return found

    def read(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Start to read pages into a buffer."""
        return [self._io.read(self._file, *part) for part in self._runs(cargo, pages, buffer)]

    def write(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Start to write pages out of a buffer."""
        return [self._io.write(self._file, *part) for part in self._runs(cargo, pages, buffer)]

    def read_rows(self, rows: ValueRows, out: Tensor) -> int:
        """Read the blocks that hold rows of V, and copy the rows into memory."""
        pages, within = rows.rows // rows.rows_per_page, rows.rows % rows.rows_per_page
        begins = self._begins[rows.key, "v"] + pages * padded(rows.page_format.v.num_bytes) + within * rows.row_bytes
        return self._reader.read(begins, out)

    def close(self) -> None:
        """Give the space back."""
        self._io.close()
        self._file.close()

    def _runs(self, cargo: Cargo, pages: list[int], buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Neighbours in the file as one range: where it begins, and its part of the buffer."""
        for record, stretch in _stretches(cargo, buffer, len(pages)):
            size, first, begin = padded(record.num_bytes), self._begins[cargo.key, record.names[0]], 0
            for i in range(1, len(pages) + 1):
                if i == len(pages) or pages[i] != pages[i - 1] + 1:
                    yield first + pages[begin] * size, stretch[begin * size : i * size]
                    begin = i


def _records(cargo: Cargo) -> list[Cargo]:
    """What has records of its own in a file."""
    return [cargo._replace(names=(name,)) for name in cargo.names] if cargo.page_format.is_apart else [cargo]


def _stretches(cargo: Cargo, buffer: Tensor, count: int) -> Iterator[tuple[Cargo, Tensor]]:
    """The part of a buffer that has the records of ``count`` pages, for everything that has records of its own."""
    begin = 0
    for record in _records(cargo):
        end = begin + count * padded(record.num_bytes)
        yield record, buffer[begin:end]
        begin = end

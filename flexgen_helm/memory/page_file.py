"""Pages on disk: a file with a record for each page of each attention call, K before V."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from torch import Tensor

from flexgen_helm.errors import DiskFull
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.buffers import padded
from flexgen_helm.memory.direct_io import DirectFile, DiskIO
from flexgen_helm.memory.page_tensors import CacheKey, PageShape, PageTensors


class DiskPages:
    """Pages in a file that has no name: it is gone at `close`, or with the process."""

    def __init__(self, folder: Path, capacity: int, *, page_bytes: int) -> None:
        """Make the file.

        Args:
            folder: Where it goes.
            capacity: Pages that it may hold.
            page_bytes: K and V of a page in all layers.

        Raises:
            DiskFull: If the folder has less room than that.
        """
        folder.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(folder).free, capacity * page_bytes
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
        self._begins: dict[CacheKey, int] = {}
        self._end = 0

    def register(self, key: CacheKey, shape: PageShape) -> None:
        """Make room for an attention call."""
        if key not in self._begins:
            self._begins[key] = self._end
            self._end += self._capacity * self.transfer_bytes(shape)

    def transfer_bytes(self, shape: PageShape) -> int:
        """Bytes of a record, which direct access wants to be whole pages of memory."""
        return padded(sum(shape.num_bytes))

    def view(self, shape: PageShape, buffer: Tensor, count: int) -> PageTensors:
        """The pages of a transfer in a buffer of bytes."""
        k, v = shape.num_bytes
        records = buffer[: count * self.transfer_bytes(shape)].view(count, -1)
        return shape.view(records[:, :k], records[:, k : k + v])

    def read(self, key: CacheKey, shape: PageShape, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Start to read pages into a buffer."""
        return [self._io.read(self._file, *part) for part in self._runs(key, shape, pages, buffer)]

    def write(self, key: CacheKey, shape: PageShape, pages: list[int], buffer: Tensor) -> list[Future[None]]:
        """Start to write pages out of a buffer."""
        return [self._io.write(self._file, *part) for part in self._runs(key, shape, pages, buffer)]

    def close(self) -> None:
        """Give the space back."""
        self._io.close()
        self._file.close()

    def _runs(self, key: CacheKey, shape: PageShape, pages: list[int], buffer: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Neighbours in the file as one range: where it begins, and its part of the buffer."""
        size, begin = self.transfer_bytes(shape), 0
        for i in range(1, len(pages) + 1):
            if i == len(pages) or pages[i] != pages[i - 1] + 1:
                yield self._begins[key] + pages[begin] * size, buffer[begin * size : i * size]
                begin = i

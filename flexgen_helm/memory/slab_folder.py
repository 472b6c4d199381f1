"""Slabs on disk: for each slab a file with its bytes and a file with its description."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from flexgen_helm.errors import CorruptFile, DiskFull
from flexgen_helm.memory.amounts import gib
from flexgen_helm.memory.direct_io import DirectFile, DiskIO, file_error
from flexgen_helm.memory.slab import SlabLayout

TEMPORARY = ".slab-"
"""Begins the names of files that are being written."""
_IDENTITY = "slabs.json"
LAYOUT_CHECKSUM = "layout_xxh3_64"


class SlabFolder:
    """A folder with the slabs of one model.

    A file gets its name only when it is complete and on the disk. Its description is written after it. So a process may be
    killed at any moment. Equal identities and layouts give equal bytes, so several processes may read and write a folder at
    the same time.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, str], layouts: Mapping[int, SlabLayout], parts: Sequence[str] = ()
    ) -> None:
        """Open the folder, or make it.

        Args:
            path: Path of the folder.
            identity: Everything that decides the bytes of the weights, such as their digest and dtype.
            layouts: Layouts of the slabs that will be used, by number. Other slabs in the folder are kept.
            parts: Names of folders in it for files that only its users write.

        Raises:
            CorruptFile: If the folder holds slabs of another identity or of other layouts.
            DiskFull: If there is no space even for a description.
            FlexGenError: If the folder cannot be used.
        """
        self.path, self._layouts = path, dict(layouts)
        self._identity = dict(identity)
        self._checksums: dict[int, str] = {}
        self._verified: set[int] = set()
        with _clear_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDONLY)
        self._tidy(parts)
        try:
            self._claim()
            for j in self._layouts:
                self._describe(j)
        except BaseException:
            os.close(self._lock)
            raise
        self._io = DiskIO()

    @staticmethod
    def described(path: Path) -> dict[int, SlabLayout]:
        """Return the layouts of the complete slabs in a folder, by number, but none of a torn description."""
        layouts: dict[int, SlabLayout] = {}
        for file in sorted(path.glob("unit_*.json")):
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                found = _load(file) or {}
                # The slab's own checksum does not cover where its tensors begin; earlier versions wrote no checksum of that.
                if found.get(LAYOUT_CHECKSUM) in (None, _checksum_of_layout(found["layout"])):
                    layouts[int(file.stem.removeprefix("unit_"))] = SlabLayout.from_json(found["layout"])
        return layouts

    @staticmethod
    def claimed(path: Path) -> dict[str, Any] | None:
        """Return the identity of the slabs in a folder; None if nothing has claimed it."""
        return _load(path / _IDENTITY)

    def missing(self) -> list[int]:
        """Return the numbers of the slabs that are missing or incomplete."""
        return [j for j in self._layouts if j not in self._checksums or _size(self._file(j)) != self._layouts[j].num_bytes]

    def check_space(self, needed: int) -> None:
        """Check that there is space for slabs.

        Args:
            needed: Bytes of those that will be written.

        Raises:
            DiskFull: If the disk has less free space.
        """
        with _clear_errors(self.path):
            free = shutil.disk_usage(self.path).free
        if needed > free:
            raise DiskFull(
                f"Weights on disk need {gib(needed)} more in {self.path}, which has {gib(free)} free. "
                "Free some space, give an offload_folder on another disk, or put a smaller share of the weights on disk."
            )

    def write(self, j: int, memory: Tensor, layout: SlabLayout | None = None) -> None:
        """Write slab j and wait until it is on the disk.

        Args:
            j: Number of the slab.
            memory: uint8 ``[at least its layout's num_bytes]`` at a page boundary.
            layout: Its layout; None if the folder knows it.

        Raises:
            DiskFull: If there is no space left; complete slabs are kept.
            FlexGenError: If the slab cannot be written for another reason.
        """
        if layout is not None:
            self._layouts[j] = layout
        memory = memory[: self._layouts[j].num_bytes]
        with self._new_file(self._file(j)) as temporary:
            file = DirectFile(temporary, os.O_WRONLY)
            try:
                writing = self._io.write(file, 0, memory)
                checksum = _checksum(memory)
                writing.result()
                os.fsync(file.descriptor)
            finally:
                file.close()
        plain = self._layouts[j].to_json()
        description = {"layout": plain, "xxh3_64": checksum, LAYOUT_CHECKSUM: _checksum_of_layout(plain)}
        self._save(self._description(j), description)
        self._checksums[j] = checksum
        self._verified.discard(j)

    def read(self, j: int, into: Tensor) -> Future[None]:
        """Start to read slab j.

        Args:
            j: Number of the slab.
            into: uint8 ``[at least its layout's num_bytes]`` at a page boundary; must not be touched until the future is done.

        Returns:
            A future that is done when the slab has arrived. It raises CorruptFile if the slab is missing or torn, or if its
            checksum, which is computed at the first read, is wrong.
        """
        into = into[: self._layouts[j].num_bytes]
        try:
            file = DirectFile(self._file(j))
        except BaseException as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed
        reading = self._io.read(file, 0, into, None if j in self._verified else lambda: self._verify(j, into))
        reading.add_done_callback(lambda _: file.close())
        return reading

    def close(self) -> None:
        """Wait for reads that run, drop those that have not begun, and release the folder."""
        self._io.close()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _verify(self, j: int, memory: Tensor) -> None:
        if _checksum(memory) != self._checksums.get(j):
            raise CorruptFile(
                f"{self._file(j)} is not what was written: its checksum differs. Check the disk, delete the file and run the "
                "command again; the file is then written again."
            )
        self._verified.add(j)

    def _tidy(self, parts: Sequence[str]) -> None:
        """Remove incomplete files of killed processes, unless another process uses the folder; a lock ends with its process."""
        with contextlib.suppress(OSError):  # file systems without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in (self.path, *(self.path / part for part in parts)):
                for path in folder.glob(f"{TEMPORARY}*"):
                    path.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_SH)

    def _claim(self) -> None:
        """Write the identity of the slabs, or check that it is ours; one of several processes is first."""
        path = self.path / _IDENTITY
        if not path.exists():
            self._save(path, self._identity, once=True)
        found = _load(path)
        if found != self._identity:
            holds = ", ".join(f"{key} {value}" for key, value in found.items()) if found else "something unknown"
            wanted = ", ".join(f"{key} {value}" for key, value in self._identity.items())
            raise CorruptFile(f"{self.path} holds slabs of {holds}, not of {wanted}. Give another offload_folder or delete it.")

    def _describe(self, j: int) -> None:
        found = _load(self._description(j))
        if found is None:
            return
        if found.get("layout") != self._layouts[j].to_json():
            raise CorruptFile(
                f"{self._file(j)} has other tensors than part {j} of the model. Give another offload_folder or delete this one."
            )
        self._checksums[j] = str(found.get("xxh3_64"))

    def _file(self, j: int) -> Path:
        return self.path / f"unit_{j:05d}.slab"

    def _description(self, j: int) -> Path:
        return self.path / f"unit_{j:05d}.json"

    def _save(self, path: Path, content: object, *, once: bool = False) -> None:
        with self._new_file(path, once=once) as temporary, temporary.open("w") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        with _clear_errors(path):
            os.fsync(self._lock)

    @contextlib.contextmanager
    def _new_file(self, path: Path, *, once: bool = False) -> Iterator[Path]:
        """Yield a temporary file to fill; it then replaces the file at the path, or, if ``once``, is dropped if that exists."""
        with _clear_errors(path):
            descriptor, name = tempfile.mkstemp(dir=self.path, prefix=TEMPORARY)
            os.close(descriptor)
            try:
                yield Path(name)
                if once:
                    with contextlib.suppress(FileExistsError):
                        os.link(name, path)
                else:
                    os.replace(name, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise file_error(path, error) from error


def _load(path: Path) -> dict[str, Any] | None:
    """Return the content of a description; None if it is missing or torn."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _checksum_of_layout(plain: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def _checksum(memory: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(memory.numpy().data)

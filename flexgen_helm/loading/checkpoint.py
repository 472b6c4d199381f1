"""Read the safetensors files of a checkpoint: check headers and sizes first, then read single tensors without a copy."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from flexgen_helm.errors import CorruptFile, UnsupportedModel

SINGLE_FILE = "model.safetensors"
"""Name of the weight file of a checkpoint that is one file."""
INDEX_FILE = "model.safetensors.index.json"
"""Name of the file that says which of several weight files (shards) holds which tensor."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtypes by their names in the safetensors format."""
LENGTH_BYTES = 8
"""Size of the header's length, with which a file begins, in bytes."""
MAX_HEADER_BYTES = 100_000_000
"""Limit of the format for the header, in bytes."""
PIECE_BYTES = 2**20
"""Size of the piece of a tensor that is converted to another dtype at a time, in bytes."""
HEAP_BYTES = 2**16
"""Tensors of at least this size, in bytes, are mapped separately: the heap would keep the freed memory of two layers."""
LFS_POINTER = b"version https://git-lfs"
"""The first bytes of a file that Git LFS has not fetched."""
LAYER = re.compile(r"^(.*?\.\d+)\.")
"""Matches the name of a tensor in a numbered module; group 1 is the name of the module."""


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a safetensors file.

    transformers' conversion takes it for a slice of an open file: ``stored[...].to(device=..., dtype=...)`` reads the tensor.
    """

    name: str
    """Name in the file."""
    file: Path
    """The safetensors file."""
    dtype: torch.dtype
    """The dtype in the file."""
    shape: tuple[int, ...]
    """The shape in the file."""
    start: int
    """Offset of the tensor's first byte from the beginning of the file, in bytes."""
    num_bytes: int
    """Size in the file, in bytes."""

    def first_rows(self, count: int) -> StoredTensor:
        """Return the place of the tensor's first ``count`` rows."""
        return replace(self, shape=(count, *self.shape[1:]), num_bytes=self.num_bytes // self.shape[0] * count)

    def __getitem__(self, index: EllipsisType) -> StoredTensor:
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Read the tensor. If it is converted to another dtype, memory holds only a piece of it in the file's dtype.

        Args:
            device: The device of the result. None means the CPU.
            dtype: The dtype of the result. None means the file's dtype.

        Raises:
            CorruptFile: If the file became shorter since its header was checked.
        """
        result = _memory(self.shape, dtype or self.dtype)
        flat = result.view(-1)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            if result.dtype == self.dtype:
                self._fill(stream, flat)
            else:
                piece = _memory((min(PIECE_BYTES // self.dtype.itemsize, len(flat)),), self.dtype)
                for part in flat.split(max(len(piece), 1)):
                    self._fill(stream, piece[: len(part)])
                    part.copy_(piece[: len(part)])
        return result.to(device) if device is not None else result

    def _fill(self, stream: Any, target: Tensor) -> None:
        view = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while view:
            count = stream.readinto(view)
            if not count:
                raise CorruptFile(f"{self.file} ends inside the tensor {self.name}. Fetch that file again.")
            view = view[count:]


def read_index(folder: Path) -> dict[str, str] | None:
    """Return which file of a checkpoint holds which tensor.

    Args:
        folder: The folder with the weight files.

    Returns:
        File names by tensor name. None if the checkpoint is a single file.

    Raises:
        CorruptFile: If the index is torn, or if neither the index nor the single file exists.
    """
    path = folder / INDEX_FILE
    if path.is_file():
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
            if not all(isinstance(shard, str) for shard in weight_map.values()):
                raise TypeError("weight_map names something that is not a file")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFile(
                f"{path} is not a checkpoint index ({type(error).__name__}: {error}). Fetch that file again."
            ) from error
        return dict(weight_map)
    if (folder / SINGLE_FILE).is_file():
        return None
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    raise CorruptFile(
        f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}, but {_listed(found)}. Fetch the index too, or rename the file "
        f"that holds the whole model to {SINGLE_FILE}."
    )


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Check the weight files of a model folder by their headers and sizes; no tensor is read.

    Args:
        folder: The folder with the weight files.

    Returns:
        The place of each tensor, by its name in the files.

    Raises:
        CorruptFile: If a file is missing, torn, not in safetensors format, or lacks a tensor that the index says it has.
        UnsupportedModel: If a tensor has a dtype that is not in `DTYPES`.
    """
    index = read_index(folder)
    shards = [SINGLE_FILE] if index is None else sorted(set(index.values()))
    headers = {shard: _read_header(folder / shard) for shard in shards}
    for tensor, shard in (index or {}).items():
        if tensor not in headers[shard]:
            lacking = [name for name, other in (index or {}).items() if other == shard and name not in headers[shard]]
            raise CorruptFile(
                f"{folder / shard} lacks {_listed(lacking)}, which {INDEX_FILE} says it holds: they are of different models or "
                "versions. Fetch both files again."
            )
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    return tensors | {tensor: headers[shard][tensor] for tensor, shard in (index or {}).items()}


def layer_of(name: str) -> str:
    """Return the numbered module that holds a tensor, such as ``model.layers.3``, or the tensor's own name if there is none."""
    found = LAYER.match(name)
    return found[1] if found else name


def group_by_layer(tensors: Iterable[StoredTensor], target: Callable[[str], str]) -> dict[str, list[StoredTensor]]:
    """Group the tensors of a checkpoint by the layer that they become part of; see `layer_of`.

    Args:
        tensors: The tensors in the order of loading.
        target: Maps a tensor's name in a file to its name in the model. Several tensors may become one, such as experts.

    Returns:
        The tensors of each layer, by the name of the layer, such as ``model.layers.3``.
    """
    groups: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault(layer_of(target(tensor.name)), []).append(tensor)
    return groups


def _read_header(path: Path) -> dict[str, StoredTensor]:
    if not path.is_file():
        raise CorruptFile(f"{path} is missing. Fetch that file again.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        begin = stream.read(LENGTH_BYTES)
        length = int.from_bytes(begin, "little")
        if len(begin) < LENGTH_BYTES:
            raise CorruptFile(f"{path} is torn: it has {size} bytes. Fetch that file again.")
        content = stream.read(min(length, MAX_HEADER_BYTES))
    if (begin + content).startswith(LFS_POINTER):
        raise CorruptFile(f"{path} is a pointer of Git LFS, not the file itself. Run `git lfs pull` in its folder.")
    if length > MAX_HEADER_BYTES or not content.startswith(b"{"):
        raise CorruptFile(f"{path} is not a safetensors file: it does not begin with a header. Fetch that file again.")
    if len(content) < length:
        raise CorruptFile(
            f"{path} is torn: it has {size} bytes of a header of {LENGTH_BYTES + length} alone. Fetch that file again."
        )
    try:
        tensors = _parse_header(path, json.loads(content), LENGTH_BYTES + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(
            f"{path} is not a safetensors file: its header cannot be read ({type(error).__name__}: {error}). "
            "Fetch that file again."
        ) from error
    expected = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=LENGTH_BYTES + length)
    if size != expected:
        wrong = "torn" if size < expected else "too long"
        raise CorruptFile(f"{path} is {wrong}: it has {size} of {expected} bytes. Fetch that file again.")
    return tensors


def _parse_header(path: Path, header: dict[str, Any], data_start: int) -> dict[str, StoredTensor]:
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise UnsupportedModel(
                f"{path} holds {name} as {entry['dtype']}, which is none of {', '.join(DTYPES)}. Give the 16-bit checkpoint."
            )
        begin, end = entry["data_offsets"]
        tensor = StoredTensor(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), data_start + begin, end - begin)
        if begin < 0 or tensor.num_bytes != torch.Size(tensor.shape).numel() * tensor.dtype.itemsize:
            raise ValueError(f"the bytes {begin} to {end} of {name} do not fit its shape {list(tensor.shape)}")
        tensors[name] = tensor
    return tensors


def _memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < HEAP_BYTES:
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _listed(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

"""Files of fitting: tensors that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import xxhash
from safetensors.torch import load, save
from torch import Tensor

from flexgen_helm.errors import CorruptFile
from flexgen_helm.memory.direct_io import file_error
from flexgen_helm.memory.slab_folder import TEMPORARY

CHECKSUM_BYTES = 8


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in the order of their names, so that equal ones give equal bytes.

    Args:
        file: The file. Its folder is made if it is missing.
        tensors: Tensors on any device.

    Raises:
        DiskFull: If there is no space.
        FlexGenError: If the file cannot be written for another reason.
    """
    _write(file, _content(tensors))


def save_checked(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as `save_tensors` does, with a checksum behind them, for `load_checked`."""
    content = _content(tensors)
    _write(file, content + _checksum(content))


def load_checked(file: Path) -> dict[str, Tensor]:
    """Read what `save_checked` wrote.

    Raises:
        CorruptFile: If the file cannot be read, or is not what was written.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CorruptFile(f"{file} cannot be read ({error}).") from error
    tensors, checksum = content[:-CHECKSUM_BYTES], content[-CHECKSUM_BYTES:]
    if checksum != _checksum(tensors):
        raise CorruptFile(f"{file} cannot be read (its checksum differs: it is torn, damaged, or of another version).")
    return load(tensors)


def _checksum(content: bytes) -> bytes:
    return xxhash.xxh3_64_digest(content)


def _content(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensors[name].cpu().contiguous() for name in sorted(tensors)})


def _write(file: Path, content: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=TEMPORARY)  # which the next user removes after a kill
        try:
            with open(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise file_error(file, error) from error

"""Files of fitting: tensors that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from flexgen_helm.memory.direct_io import file_error


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in the order of their names, so that equal ones give equal bytes.

    Args:
        file: The file. Its folder is made if it is missing.
        tensors: Tensors on any device.

    Raises:
        DiskFull: If there is no space.
        FlexGenError: If the file cannot be written for another reason.
    """
    content = save({name: tensors[name].cpu().contiguous() for name in sorted(tensors)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
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

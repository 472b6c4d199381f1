"""What HELM writes for a run, without what depends on the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexgen_helm.reports.runs import HELM_FILES as FILES
from flexgen_helm.runs.kill_test.files import timeless

__all__ = ["FILES", "completed", "read", "timeless"]


def read(folder: Path, run: str, file: str) -> Any:
    """Returns the parsed content of a file of a run."""
    return json.loads((folder / run / file).read_text())


def completed(folder: Path) -> list[str]:
    """Returns the names of the runs of a suite that are complete."""
    return sorted(path.parent.name for path in folder.glob("*/stats.json"))

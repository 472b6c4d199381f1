"""What HELM writes for a run, without what depends on the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ("run_spec.json", "scenario.json", "scenario_state.json", "stats.json", "per_instance_stats.json")
TIMES = ("request_time", "request_datetime", "batch_size", "batch_request_time", "cached")
TIME_STATS = ("inference_runtime", "inference_denoised_runtime", "batch_size")


def read(folder: Path, run: str, file: str) -> Any:
    """Returns the parsed content of a file of a run."""
    return json.loads((folder / run / file).read_text())


def completed(folder: Path) -> list[str]:
    """Returns the names of the runs of a suite that are complete."""
    return sorted(path.parent.name for path in folder.glob("*/stats.json"))


def timeless(value: Any) -> Any:
    """Removes from parsed JSON what depends on the clock or on how requests were grouped."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [timeless(item) for item in value if not _is_time_stat(item)]
    return value


def _is_time_stat(item: Any) -> bool:
    name = item.get("name") if isinstance(item, dict) else None
    return isinstance(name, dict) and name.get("name") in TIME_STATS

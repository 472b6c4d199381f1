"""What HELM writes for a suite, without what depends on the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ("run_spec.json", "scenario.json", "scenario_state.json", "stats.json", "per_instance_stats.json")
TIMES = ("request_time", "request_datetime", "batch_size", "batch_request_time", "cached")
TIME_STATS = ("inference_runtime", "inference_denoised_runtime", "batch_size")


def timeless(value: Any) -> Any:
    """Remove from parsed JSON what depends on the clock or on how requests were grouped."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [timeless(item) for item in value if not _is_time_stat(item)]
    return value


def read_suite(folder: Path) -> dict[str, Any]:
    """Return the timeless content of all of HELM's files of a suite, by run and name."""
    paths = [path for path in sorted(folder.glob("*/*.json")) if path.name in FILES]
    return {f"{path.parent.name}/{path.name}": timeless(json.loads(path.read_text())) for path in paths}


def _is_time_stat(item: Any) -> bool:
    name = item.get("name") if isinstance(item, dict) else None
    return isinstance(name, dict) and name.get("name") in TIME_STATS

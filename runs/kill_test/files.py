"""HELM's files of a suite, without the fields that depend on the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexgen_helm.reports.runs import list_runs

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
    return {f"{run.name}/{name}": timeless(content) for run in list_runs(folder) for name, content in run.documents().items()}


def _is_time_stat(item: Any) -> bool:
    name = item.get("name") if isinstance(item, dict) else None
    return isinstance(name, dict) and name.get("name") in TIME_STATS

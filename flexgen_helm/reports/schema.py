"""Which metric and split a HELM schema calls the main ones, and which metrics are better when lower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flexgen_helm.errors import FlexGenError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml reads HELM's own schema in a tenth of the time, where PyYAML was built with it."""


def read_environments(schema: Path) -> dict[str, dict[str, str]]:
    """Return the ``environment`` of every run group that has one, by the group's name.

    Raises:
        FlexGenError: The file is not YAML, or has no run groups.
    """
    groups = _entries(schema, "run_groups")
    return {group["name"]: dict(group["environment"]) for group in groups if group.get("environment")}


def read_directions(schema: Path) -> dict[str, bool]:
    """Return for every metric that has a direction whether lower is better.

    Raises:
        FlexGenError: The file is not YAML, or has no metrics.
    """
    metrics = _entries(schema, "metrics")
    return {metric["name"]: bool(metric["lower_is_better"]) for metric in metrics if metric.get("lower_is_better") is not None}


def _entries(schema: Path, key: str) -> list[dict[str, Any]]:
    try:
        entries = yaml.load(schema.read_text(encoding="utf-8"), Loader=LOADER)[key]
        return [{**entry, "name": str(entry["name"]), "environment": dict(entry.get("environment") or {})} for entry in entries]
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise FlexGenError(
            f"{schema} cannot be read as a schema of HELM ({error!r}). It needs a list `{key}`, whose entries have a "
            "`name`; without the file, HELM makes a schema of its own."
        ) from error

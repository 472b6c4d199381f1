"""Which metric and split a HELM schema calls the main ones."""

from __future__ import annotations

from pathlib import Path

import yaml

from flexgen_helm.errors import FlexGenError


def read_environments(schema: Path) -> dict[str, dict[str, str]]:
    """Return the ``environment`` of every run group that has one, by the group's name.

    Raises:
        FlexGenError: The file is not YAML, or has no run groups.
    """
    try:
        groups = yaml.safe_load(schema.read_text(encoding="utf-8"))["run_groups"]
        return {group["name"]: dict(group["environment"]) for group in groups if group.get("environment")}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise FlexGenError(
            f"{schema} cannot be read as a schema of HELM ({error!r}). It needs a list `run_groups`, whose entries have a "
            "`name`; without the file, HELM makes a schema of its own."
        ) from error

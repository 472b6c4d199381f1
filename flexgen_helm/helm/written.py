"""Checks the keys of a deployment in a user's YAML before anything is loaded. HELM drops the keys that it does not know."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml
from helm.benchmark.config_registry import MODEL_DEPLOYMENTS_FILE
from helm.benchmark.model_deployment_registry import get_model_deployment

from flexgen_helm.compression.config import split_variant
from flexgen_helm.errors import CompressionError
from flexgen_helm.helm.deployment import (
    DEPLOYMENT,
    DeploymentError,
    EngineArguments,
    check_keys,
    is_flexgen,
    parse_arguments,
)


def check_deployment(name: str, local_path: str | None) -> None:
    """Check all keys of a flexgen deployment; others are left alone.

    Args:
        name: Name of the deployment.
        local_path: Folder that may hold ``model_deployments.yaml``: ``--local-path`` of helm-run.

    Raises:
        DeploymentError: A key does not exist, ``name_or_path`` is missing, or the name says another variant than the keys.
        CompressionError: There is no such variant.
    """
    deployment = get_model_deployment(name)
    if not is_flexgen(deployment):
        return
    file = Path(local_path or "") / MODEL_DEPLOYMENTS_FILE
    try:
        for written in _written(file) if local_path is not None else ():
            if written.get("name") == name:
                _check_written(written)
        _check_variant(name, parse_arguments(deployment.client_spec.args))
    except (DeploymentError, CompressionError) as error:
        raise type(error)(f"Deployment `{name}`: {error}") from None


def _check_written(written: dict[str, Any]) -> None:
    check_keys(DEPLOYMENT, written)
    for part in ("client_spec", "window_service_spec"):
        if isinstance(written.get(part), dict):
            check_keys(part, written[part])


def _check_variant(name: str, arguments: EngineArguments) -> None:
    """Check that results which HELM shows under the name of a variant are that variant's."""
    try:
        _, named = split_variant(name.partition("/")[2])
    except CompressionError:  # a word of the user's own
        return
    if named is not None and named.canonical != arguments.get("compression", ""):
        raise DeploymentError(
            f"the name says `@{named.canonical}`, but client_spec.args name the variant `{arguments.get('compression')}`. "
            f"Write `compression: {named.canonical}` there, or rename the deployment."
        )


@functools.cache
def _written(file: Path) -> tuple[dict[str, Any], ...]:
    """Deployments as they stand in a file that HELM has read when the command began."""
    if not file.is_file():
        return ()
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return tuple(content["model_deployments"])

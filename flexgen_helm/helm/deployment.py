"""Names and arguments of flexgen deployments. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from helm.benchmark.model_deployment_registry import ModelDeployment

from flexgen_helm.errors import FlexGenError
from flexgen_helm.types import Policy

PREFIX = "flexgen"
CLIENT = "flexgen_helm.helm.client.FlexGenClient"
WINDOW_SERVICE = "flexgen_helm.helm.window_service.FlexGenWindowService"
TOKENIZER = "flexgen_helm.helm.tokenizer.FlexGenTokenizer"
RUNNER = "flexgen_helm.helm.runner.FlexGenRunner"
GRAMMAR = f"`{PREFIX}/<organization>/<model>` for a name on the hub or `{PREFIX}//<absolute path>` for a folder"

EngineArguments = dict[str, Any]
"""Keywords of ``Engine.from_pretrained``."""


class DeploymentError(FlexGenError):
    """A deployment whose name or arguments cannot be understood."""


def is_flexgen(deployment: ModelDeployment) -> bool:
    """Whether the engine of this package serves the deployment."""
    return bool(deployment.client_spec.class_name == CLIENT)


def split_name(name: str) -> tuple[str, str | None]:
    """Split a deployment name into hub name or path, and what follows an ``@`` in its last part.

    Raises:
        DeploymentError: The name does not follow the grammar.
    """
    prefix, _, name_or_path = name.partition("/")
    folder, _, last = name_or_path.rpartition("/")
    model, _, suffix = last.partition("@")
    if prefix != PREFIX or not model or (folder and not folder.startswith("/") and "/" in folder):
        raise DeploymentError(f"`{name}` is not the name of a flexgen deployment. Write {GRAMMAR}.")
    path = f"{folder}/{model}" if folder or name_or_path.startswith("/") else model
    return path, suffix or None


def parse_arguments(arguments: Mapping[str, Any]) -> EngineArguments:
    """Check ``client_spec.args`` of a deployment and build the objects that YAML cannot hold.

    Which keywords exist is left to ``Engine.from_pretrained``; see ``check_keywords``.

    Raises:
        DeploymentError: ``name_or_path`` is missing, or the policy has a field that does not exist.
    """
    if not isinstance(arguments.get("name_or_path"), str):
        raise DeploymentError(
            "client_spec.args of a flexgen deployment has no `name_or_path`, so it is unknown which model to load. "
            "Set it to a hub name or to the path of a model folder."
        )
    parsed = dict(arguments)
    policy = parsed.get("policy")
    if isinstance(policy, Mapping):
        parsed["policy"] = _parse_policy(policy)
    return parsed


def _parse_policy(fields: Mapping[str, Any]) -> Policy:
    known = [field.name for field in dataclasses.fields(Policy)]
    check_keywords("policy", fields, known)
    return Policy(**fields)


def check_keywords(what: str, given: Mapping[str, Any], known: list[str]) -> None:
    """Compare keywords with those that exist.

    Raises:
        DeploymentError: One does not exist; the message lists those that do.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise DeploymentError(
            f"{what} of a flexgen deployment has no keyword {', '.join(f'`{name}`' for name in unknown)}. "
            f"Nothing is silently ignored: remove it, or use one of {', '.join(f'`{name}`' for name in known)}."
        )

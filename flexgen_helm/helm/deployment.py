"""Names and arguments of flexgen deployments. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
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

DEPLOYMENT, ARGUMENTS, POLICY = "the deployment", "client_spec.args", "client_spec.args.policy"
KEYS: dict[str, tuple[str, ...]] = {
    DEPLOYMENT: tuple(field.name for field in dataclasses.fields(ModelDeployment)),
    "client_spec": ("class_name", "args"),
    ARGUMENTS: (
        *("name_or_path", "dtype", "device", "policy", "max_memory", "offload_folder", "kv_dtype", "revision", "order"),
        *("rows", "dummy_weights", "recheck"),
    ),
    POLICY: tuple(field.name for field in dataclasses.fields(Policy)),
    "window_service_spec": ("class_name", "args"),
}
"""The keys of each part of a flexgen deployment in ``model_deployments.yaml``. Engine.from_pretrained is not asked for its
keywords, because that would import torch."""


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

    Raises:
        DeploymentError: ``name_or_path`` is missing, or a keyword or a field of the policy does not exist.
    """
    if not isinstance(arguments.get("name_or_path"), str):
        raise DeploymentError(
            "client_spec.args of a flexgen deployment has no `name_or_path`, so it is unknown which model to load. "
            "Set it to a hub name or to the path of a model folder."
        )
    check_keys(ARGUMENTS, arguments)
    parsed = dict(arguments)
    policy = parsed.get("policy")
    if isinstance(policy, Mapping):
        parsed["policy"] = _parse_policy(policy)
    return parsed


def _parse_policy(fields: Mapping[str, Any]) -> Policy:
    check_keys(POLICY, fields)
    return Policy(**fields)


def check_keys(place: str, given: Iterable[object]) -> None:
    """Compare the keys at one place of a deployment with those that exist.

    Args:
        place: One of ``KEYS``.
        given: The keys that are there.

    Raises:
        DeploymentError: One does not exist; the message suggests the most similar one and lists those that exist.
    """
    unknown = sorted({str(key) for key in given} - set(KEYS[place]))
    if unknown:
        known = ", ".join(f"`{key}`" for key in KEYS[place])
        words = " ".join(f"{place} has no key `{key}`.{_suggestion(place, key)}" for key in unknown)
        raise DeploymentError(f"{words} Correct or remove it. The keys of {place} are {known}.")


def _suggestion(place: str, key: str) -> str:
    """The most similar key there is, at the same place if there is one."""
    for other in (place, *(other for other in KEYS if other != place)):
        found = difflib.get_close_matches(key, KEYS[other], n=1)
        if found:
            return f" Did you mean `{found[0]}`{'' if other == place else f' of {other}'}?"
    return ""

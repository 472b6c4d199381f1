"""Names and arguments of flexgen deployments. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from helm.benchmark.model_deployment_registry import ModelDeployment

from flexgen_helm.compression.config import CompressionConfig, resolve, with_variant
from flexgen_helm.errors import FlexGenError
from flexgen_helm.types import Policy

PREFIX = "flexgen"
CLIENT = "flexgen_helm.helm.client.FlexGenClient"
WINDOW_SERVICE = "flexgen_helm.helm.window_service.FlexGenWindowService"
TOKENIZER = "flexgen_helm.helm.tokenizer.FlexGenTokenizer"
RUNNER = "flexgen_helm.helm.runner.FlexGenRunner"
GRAMMAR = (
    f"`{PREFIX}/<organization>/<model>` for a name on the hub or `{PREFIX}//<absolute path>` for a folder, with `@w4` and the "
    "like behind it for a compressed variant"
)

EngineArguments = dict[str, Any]
"""Keywords of ``Engine.from_pretrained``."""

DEPLOYMENT, ARGUMENTS, POLICY = "the deployment", "client_spec.args", "client_spec.args.policy"
KEYS: dict[str, tuple[str, ...]] = {
    DEPLOYMENT: tuple(field.name for field in dataclasses.fields(ModelDeployment)),
    "client_spec": ("class_name", "args"),
    ARGUMENTS: (
        *("name_or_path", "dtype", "device", "policy", "profile", "max_memory", "offload_folder", "kv_dtype"),
        *("compression", "revision", "order", "rows", "dummy_weights", "recheck", "compile_layers"),
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


@dataclass(frozen=True)
class ModelName:
    """What the name of a deployment says: ``flexgen/<model>[#<revision>][@<variant>]``."""

    name_or_path: str
    """Hub name, or path of a folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    compression: CompressionConfig | None = None
    """The variant; None: the model as it is."""

    @property
    def arguments(self) -> EngineArguments:
        """The same as keywords of ``Engine.from_pretrained``, in plain types."""
        named = {"revision": self.revision, "compression": self.compression.canonical if self.compression else None}
        return {"name_or_path": self.name_or_path} | {name: value for name, value in named.items() if value}

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer, which all variants share."""
        if os.path.isdir(self.name_or_path):
            return f"{PREFIX}/{os.path.abspath(self.name_or_path)}"
        return replace(self, compression=None).deployment()

    def deployment(self, options: str = "") -> str:
        """Return the name of the deployment in canonical form, with the names of other options before the variant."""
        revision = f"#{self.revision}" if self.revision else ""
        return with_variant(f"{PREFIX}/{self.name_or_path}{revision}{options}", self.compression)

    def display(self, name: str) -> str:
        """Return a model's name as tables show it: with the variant in words."""
        if self.compression is None:
            return name
        return f"{name.removesuffix(f'@{self.compression.canonical}')} ({self.compression.description})"


def split_name(name: str) -> ModelName:
    """Return what a deployment name says.

    Raises:
        DeploymentError: The name does not follow the grammar.
        CompressionError: There is no such variant.
    """
    prefix, _, full = name.partition("/")
    source, compression = resolve(full)
    revision = ""
    if not source.startswith("/") and not os.path.isdir(source):
        source, _, revision = source.partition("#")
    folder, _, model = source.rpartition("/")
    if prefix != PREFIX or not model or model.startswith("@") or (folder and not folder.startswith("/") and "/" in folder):
        raise DeploymentError(f"`{name}` is not the name of a flexgen deployment. Write {GRAMMAR}.")
    return ModelName(source, revision or None, compression)


def named_model(arguments: Mapping[str, Any]) -> ModelName:
    """Return which model and variant ``client_spec.args`` of a deployment name.

    Raises:
        CompressionError: There is no such variant.
    """
    source, compression = resolve(arguments["name_or_path"], arguments.get("compression"))
    return ModelName(source, arguments.get("revision"), compression)


def parse_arguments(arguments: Mapping[str, Any]) -> EngineArguments:
    """Check ``client_spec.args`` of a deployment and build the objects that YAML cannot hold.

    Returns:
        Keywords with which equal engines are equal: the variant is in ``compression``, in canonical form.

    Raises:
        DeploymentError: ``name_or_path`` is missing, or a keyword or a field of the policy does not exist.
        CompressionError: There is no such variant.
    """
    if not isinstance(arguments.get("name_or_path"), str):
        raise DeploymentError(
            "client_spec.args of a flexgen deployment has no `name_or_path`, so it is unknown which model to load. "
            "Set it to a hub name or to the path of a model folder."
        )
    check_keys(ARGUMENTS, arguments)
    parsed = {name: value for name, value in arguments.items() if name != "compression"} | named_model(arguments).arguments
    policy = parsed.get("policy")
    if isinstance(policy, Mapping):
        parsed["policy"] = _parse_policy(policy)
    elif policy == "auto":
        del parsed["policy"]  # it is what an engine does without a policy
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

"""HELM entry point: makes deployments of names that begin with ``flexgen/``.

Neither torch nor transformers is imported with it: only where a deployment is made.
"""

from __future__ import annotations

import dataclasses
import os

from helm.benchmark.model_deployment_registry import (
    ALL_MODEL_DEPLOYMENTS,
    ClientSpec,
    ModelDeployment,
    WindowServiceSpec,
    model_deployment_generator,
    register_model_deployment,
)
from helm.benchmark.model_metadata_registry import (
    ModelMetadata,
    get_all_models,
    get_unknown_model_metadata,
    register_model_metadata,
)
from helm.benchmark.tokenizer_config_registry import (
    TokenizerConfig,
    TokenizerSpec,
    register_tokenizer_config,
    tokenizer_config_generator,
)

from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.helm.deployment import (
    CLIENT,
    GRAMMAR,
    PREFIX,
    TOKENIZER,
    WINDOW_SERVICE,
    DeploymentError,
    is_flexgen,
    split_name,
)
from flexgen_helm.helm.model_files import find_model, read_limits
from flexgen_helm.scenarios import run_specs, summarization  # noqa: F401  registers the run entries


@model_deployment_generator(PREFIX)
def make_model_deployment(name: str) -> ModelDeployment:
    """Make and register the deployment of a name, so that HELM asks only once.

    Args:
        name: ``flexgen/<organization>/<model>`` or ``flexgen//<absolute path>``.

    Raises:
        DeploymentError: The name does not follow the grammar or there is no such model.
        CorruptFile: A file of the model is torn.
    """
    name_or_path = find(name)
    deployment = ModelDeployment(
        name=name,
        client_spec=ClientSpec(CLIENT, args={"name_or_path": name_or_path}),
        max_sequence_length=_window(name_or_path),
    )
    deployment = complete(deployment)
    _register_metadata(deployment)
    register_model_deployment(deployment)
    return deployment


def find(name: str) -> str:
    """Return the hub name or path of a deployment's model; loads neither torch nor transformers.

    Args:
        name: ``flexgen/<organization>/<model>`` or ``flexgen//<absolute path>``.

    Raises:
        DeploymentError: The name does not follow the grammar or there is no such model.
    """
    name_or_path, variant = split_name(name)
    if variant is not None and os.path.isdir(f"{name_or_path}@{variant}"):
        raise DeploymentError(
            f"`{name}`: `@` begins a variant in the name of a deployment, so the folder {name_or_path}@{variant} cannot be "
            "named by it. Rename the folder, or name it by a link without `@`."
        )
    if variant is not None:
        raise DeploymentError(
            f"`{name}`: variants such as `@{variant}` are not supported, so it is unknown what to change in the model. "
            f"Write {GRAMMAR}, or a deployment in model_deployments.yaml whose args hold what you want to vary."
        )
    find_model(name_or_path)
    return name_or_path


def _window(name_or_path: str) -> int | None:
    try:
        return read_limits(name_or_path).window
    except UnsupportedModel:
        # Each run entry of this model asks again and fails with the reason; those of other models run.
        return None


@tokenizer_config_generator(PREFIX)
def make_tokenizer_config(name: str) -> TokenizerConfig:
    """Make and register the tokenizer of a deployment, so that HELM asks only once.

    Args:
        name: As of a deployment, with ``@<revision>`` where a revision is meant.

    Raises:
        DeploymentError: The name does not follow the grammar or there is no such model.
    """
    name_or_path, revision = split_name(name)
    limits = read_limits(name_or_path, revision)
    args = {"pretrained_model_name_or_path": name_or_path} | ({"revision": revision} if revision else {})
    config = TokenizerConfig(
        name=name,
        tokenizer_spec=TokenizerSpec(TOKENIZER, args=args),
        end_of_text_token=limits.eos_token,
        prefix_token=limits.prefix_token,
    )
    register_tokenizer_config(config)
    return config


HELM_WINDOW_SERVICES = tuple(
    f"helm.benchmark.window_services.{kind.lower()}_window_service.{kind}WindowService" for kind in ("Default", "Local")
)
"""HELM's own, which loop for ever where completions fill the context; ours is the same without that."""


def complete(deployment: ModelDeployment) -> ModelDeployment:
    """Return a flexgen deployment with model name, tokenizer and window service filled in where it has none."""
    name_or_path = deployment.client_spec.args.get("name_or_path")
    if not isinstance(name_or_path, str):
        return deployment
    revision = deployment.client_spec.args.get("revision")
    source = os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path
    tokenizer_name = f"{PREFIX}/{source}" + (f"@{revision}" if revision else "")
    window_service = deployment.window_service_spec or WindowServiceSpec(HELM_WINDOW_SERVICES[0])
    if window_service.class_name in HELM_WINDOW_SERVICES:
        window_args = {**window_service.args, "name_or_path": name_or_path, "revision": revision}
        window_service = WindowServiceSpec(WINDOW_SERVICE, args=window_args)
    return dataclasses.replace(
        deployment,
        model_name=_default_model_name(deployment.name) if deployment.model_name == deployment.name else deployment.model_name,
        tokenizer_name=deployment.tokenizer_name or tokenizer_name,
        window_service_spec=window_service,
    )


def _default_model_name(deployment_name: str) -> str:
    # HELM's rule for `model=` in a run entry; a deployment with another model name is refused there.
    return "/".join(deployment_name.split("/")[-2:])


def _register_metadata(deployment: ModelDeployment) -> None:
    name = deployment.model_name or deployment.name
    if name in get_all_models():
        return
    organization, _, model = name.rpartition("/")
    metadata: ModelMetadata = get_unknown_model_metadata(name)
    register_model_metadata(
        dataclasses.replace(
            metadata,
            creator_organization_name=organization or metadata.creator_organization_name,
            display_name=model,
            description=f"{deployment.client_spec.args['name_or_path']}, served by flexgen_helm.",
        )
    )


def complete_written_deployments() -> None:
    """Complete the deployments that HELM has read from ``model_deployments.yaml`` before it loads plugins."""
    for deployment in list(ALL_MODEL_DEPLOYMENTS):
        completed = complete(deployment) if is_flexgen(deployment) else deployment
        if completed != deployment:
            _register_metadata(completed)
            register_model_deployment(completed)


complete_written_deployments()

"""HELM entry point: makes deployments of names that begin with ``flexgen/``.

Neither torch nor transformers is imported with it: only where a deployment is made.
"""

from __future__ import annotations

import dataclasses

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

from flexgen_helm.errors import CompressionError, UnsupportedModel
from flexgen_helm.helm.deployment import (
    CLIENT,
    PREFIX,
    TOKENIZER,
    WINDOW_SERVICE,
    DeploymentError,
    ModelName,
    is_flexgen,
    named_model,
    split_name,
)
from flexgen_helm.helm.model_files import find_model, read_limits
from flexgen_helm.scenarios import run_specs, summarization  # noqa: F401  registers the run entries


@model_deployment_generator(PREFIX)
def make_model_deployment(name: str) -> ModelDeployment:
    """Make and register the deployment of a name, so that HELM asks only once.

    Args:
        name: ``flexgen/<organization>/<model>`` or ``flexgen//<absolute path>``, with ``@<variant>`` for a compressed one.

    Raises:
        DeploymentError: The name does not follow the grammar, is not canonical, or there is no such model.
        CompressionError: There is no such variant.
        CorruptFile: A file of the model is torn.
    """
    model = find(name)
    if name != model.deployment():
        # HELM names runs and results by what the run entry says, and every variant must have one name.
        raise DeploymentError(f"`{name}` is another spelling of `{model.deployment()}`. Write the latter.")
    deployment = ModelDeployment(
        name=name,
        client_spec=ClientSpec(CLIENT, args=model.arguments),
        max_sequence_length=_window(model),
    )
    deployment = complete(deployment)
    _register_metadata(deployment)
    register_model_deployment(deployment)
    return deployment


def find(name: str) -> ModelName:
    """Return what a deployment's name says of its model, which exists; loads neither torch nor transformers.

    Args:
        name: ``flexgen/<organization>/<model>`` or ``flexgen//<absolute path>``, with ``@<variant>`` for a compressed one.

    Raises:
        DeploymentError: The name does not follow the grammar or there is no such model.
        CompressionError: There is no such variant.
    """
    model = split_name(name)
    find_model(model.name_or_path, model.revision)
    return model


def _window(model: ModelName) -> int | None:
    try:
        return read_limits(model.name_or_path, model.revision).window
    except UnsupportedModel:
        # Each run entry of this model asks again and fails with the reason; those of other models run.
        return None


@tokenizer_config_generator(PREFIX)
def make_tokenizer_config(name: str) -> TokenizerConfig:
    """Make and register the tokenizer of a deployment, so that HELM asks only once.

    Args:
        name: As of a deployment, with ``#<revision>`` where a revision is meant. Variants have the tokenizer of their model.

    Raises:
        DeploymentError: The name does not follow the grammar or there is no such model.
        CompressionError: There is no such variant.
    """
    model = split_name(name)
    limits = read_limits(model.name_or_path, model.revision)
    args = {"pretrained_model_name_or_path": model.name_or_path} | ({"revision": model.revision} if model.revision else {})
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
    model = _named_model(deployment)
    if model is None:
        return deployment
    window_service = deployment.window_service_spec or WindowServiceSpec(HELM_WINDOW_SERVICES[0])
    if window_service.class_name in HELM_WINDOW_SERVICES:
        window_args = {**window_service.args, "name_or_path": model.name_or_path, "revision": model.revision}
        window_service = WindowServiceSpec(WINDOW_SERVICE, args=window_args)
    return dataclasses.replace(
        deployment,
        model_name=_default_model_name(deployment.name) if deployment.model_name == deployment.name else deployment.model_name,
        tokenizer_name=deployment.tokenizer_name or model.tokenizer,
        window_service_spec=window_service,
    )


def _named_model(deployment: ModelDeployment) -> ModelName | None:
    """Return the model of a written deployment; None if it names none."""
    arguments = deployment.client_spec.args
    if not isinstance(arguments.get("name_or_path"), str):
        return None
    try:
        return named_model(arguments)
    except CompressionError:
        # Each run entry of this deployment asks again and fails with the reason; those of other deployments run.
        return ModelName(arguments["name_or_path"], arguments.get("revision"))


def _default_model_name(deployment_name: str) -> str:
    # HELM's rule for `model=` in a run entry; a deployment with another model name is refused there.
    return "/".join(deployment_name.split("/")[-2:])


def _register_metadata(deployment: ModelDeployment) -> None:
    name = deployment.model_name or deployment.name
    if name in get_all_models():
        return
    organization, _, short = name.rpartition("/")
    model = _named_model(deployment)
    assert model is not None
    metadata: ModelMetadata = get_unknown_model_metadata(name)
    register_model_metadata(
        dataclasses.replace(
            metadata,
            creator_organization_name=organization or metadata.creator_organization_name,
            display_name=model.display(short),
            description=f"{model.display(model.name_or_path)}, served by flexgen_helm.",
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

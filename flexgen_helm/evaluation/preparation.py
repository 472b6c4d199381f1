"""Writes the files that HELM needs before it runs: the model's description and the suite's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flexgen_helm.assets import install_helm_data
from flexgen_helm.assets.helm_data import copy_whole
from flexgen_helm.errors import FlexGenError, OutOfSpace
from flexgen_helm.evaluation.commands import Evaluation
from flexgen_helm.helm.deployment import CLIENT, named_model
from flexgen_helm.helm.disk_errors import is_disk_full
from flexgen_helm.helm.shared_file import rewrite


def prepare(evaluation: Evaluation) -> None:
    """Describe the model and place the data of the suite. Files that are there already are left alone.

    Raises:
        OutOfSpace: The disk is full.
        FlexGenError: The folder cannot be written, or data could not be fetched.
    """
    try:
        evaluation.log_folder.mkdir(parents=True, exist_ok=True)
        write_model_metadata(evaluation)
        write_deployment(evaluation)
        place_data(evaluation)
    except OSError as error:
        kind = OutOfSpace if is_disk_full(error) else FlexGenError
        raise kind(
            f"{evaluation.output_path} cannot be written ({error}). Name a folder that can, with room, by --out."
        ) from error


def write_model_metadata(evaluation: Evaluation) -> None:
    """Describe the model to ``helm-summarize``, which does not load plugins; other models in the file stay."""
    name = "/".join(evaluation.deployment.split("/")[-2:])
    named = named_model({"name_or_path": name, **evaluation.arguments})
    model = {
        "name": name,
        "display_name": named.display(name.rpartition("/")[2]),
        "description": f"{named.display(evaluation.deployment.partition('/')[2])}, served by flexgen_helm.",
        "creator_organization_name": name.partition("/")[0],
        "access": "open",
        "release_date": None,
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }
    _put(evaluation.local_path / "model_metadata.yaml", "models", name, model)


def write_deployment(evaluation: Evaluation) -> None:
    """Describe to ``helm-run`` how the model is loaded, where its name does not say it; other deployments in the file stay."""
    file = evaluation.local_path / "model_deployments.yaml"
    options = ", ".join(f"{name}: {value}" for name, value in evaluation.options.items())
    if not options:
        if file.exists():
            _put(file, "model_deployments", evaluation.deployment, None)
        return
    deployment = {
        "name": evaluation.deployment,
        "model_name": "/".join(evaluation.deployment.split("/")[-2:]),
        "client_spec": {"class_name": CLIENT, "args": dict(evaluation.arguments)},
    }
    _put(file, "model_deployments", evaluation.deployment, deployment)
    print(f"Deployment {evaluation.deployment} in {file}: {options}", flush=True)


def _put(file: Path, section: str, name: str, entry: dict[str, Any] | None) -> None:
    """Put an entry into the list of a file of HELM's configuration, in place of one of its name; None: remove that one."""

    def change(text: str) -> str:
        try:
            entries = {known["name"]: known for known in yaml.safe_load(text)[section]} if text.strip() else {}
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise FlexGenError(f"{file} has no list `{section}` as HELM writes it ({error!r}). Repair or remove it.") from error
        entries.pop(name, None)
        kept = [*entries.values(), *([] if entry is None else [entry])]
        return yaml.safe_dump({section: kept}, sort_keys=False, default_flow_style=None)

    try:
        rewrite(file, change)
    except UnicodeDecodeError as error:
        raise FlexGenError(f"{file} is not UTF-8 text ({error}). Repair or remove it.") from error


def place_data(evaluation: Evaluation) -> None:
    """Put the suite's own data, and for suites of this package the fetched data, where HELM looks for them."""
    source = evaluation.suite.data
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target = evaluation.output_path / "scenarios" / file.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_whole(file, target)
            print(f"Data of the suite: {target}", flush=True)
    if evaluation.suite.packaged:
        install_helm_data(evaluation.output_path)


def data_of_the_suite(evaluation: Evaluation) -> list[str]:
    """Return the scenarios that read a file which came with the suite, and not one that a user or HELM put in its place."""
    source, placed = evaluation.suite.data, evaluation.output_path / "scenarios"
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    same = [
        file for file in files if (placed / file).is_file() and (placed / file).read_bytes() == (source / file).read_bytes()
    ]
    return sorted({file.parts[0] for file in same})

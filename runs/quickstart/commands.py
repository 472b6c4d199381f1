"""The HELM commands of the suite and the environment in which they run."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import yaml

SUITE = "quickstart"
RUNNER = "flexgen_helm.helm.runner.FlexGenRunner"


def suite_file(name: str) -> Path:
    """Return the path of a file of this suite."""
    return Path(str(resources.files(__package__) / name))


def run_command(model_folder: Path, output_path: Path, max_eval_instances: int) -> list[str]:
    """Return the ``helm-run`` command."""
    return [
        "helm-run",
        *("--conf-paths", str(suite_file("run_entries.conf"))),
        *("--models-to-run", f"flexgen/{model_folder.absolute()}"),
        *("--suite", SUITE),
        *("--max-eval-instances", str(max_eval_instances)),
        *("--output-path", str(output_path)),
        *("--local-path", str(local_path(output_path))),
        *("--runner-class-name", RUNNER),
    ]


def summarize_command(output_path: Path) -> list[str]:
    """Return the ``helm-summarize`` command."""
    return [
        "helm-summarize",
        *("--suite", SUITE),
        *("--output-path", str(output_path)),
        *("--local-path", str(local_path(output_path))),
        *("--schema-path", str(suite_file("schema.yaml"))),
        # The schema lists what is shown, not all that HELM measures.
        *("--schema-validation", "off"),
    ]


def server_command(output_path: Path) -> list[str]:
    """Return the ``helm-server`` command that shows the results in a browser."""
    return ["helm-server", "--suite", SUITE, "--output-path", str(output_path)]


def local_path(output_path: Path) -> Path:
    """Return the folder of HELM's configuration and request cache."""
    return output_path / "prod_env"


def write_model_metadata(model_folder: Path, output_path: Path) -> None:
    """Describe the model to ``helm-summarize``, which does not load plugins."""
    name = "/".join(model_folder.absolute().parts[-2:])
    model = {
        "name": name,
        "display_name": model_folder.name,
        "description": f"{model_folder.name}, served by flexgen_helm.",
        "creator_organization_name": "local",
        "access": "open",
        "release_date": None,
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }
    folder = local_path(output_path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_metadata.yaml").write_text(yaml.safe_dump({"models": [model]}), encoding="utf-8")


def offline_environment(output_path: Path) -> dict[str, str]:
    """Return the environment for HELM: model and data are here, so nothing should wait for a network.

    HELM downloads nltk's sentence splitter, which no metric of this suite uses, unless it finds a folder of that name.
    """
    nltk_data = local_path(output_path).absolute() / "nltk_data"
    (nltk_data / "tokenizers" / "punkt_tab").mkdir(parents=True, exist_ok=True)
    return {**os.environ, "HF_HUB_OFFLINE": "1", "NLTK_DATA": str(nltk_data)}

"""The two sides: deployments of one model folder by HELM's own client and by the engine, with the same settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from flexgen_helm.assets import install_helm_data
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.model_files import read_limits
from flexgen_helm.runs.helm_overhead.commands import RUNNER, Finished, helm_run

HELMS_CLIENT = "helm.clients.huggingface_client.HuggingFaceClient"
HELMS_TOKENIZER = "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer"
ORGANIZATION = "benchmark"


@dataclass(frozen=True)
class Contender:
    """One side."""

    prefix: str
    """Prefix of the deployment's name."""
    arguments: tuple[str, ...]
    """More arguments of ``helm-run``."""


# HELM's client takes one request at a time; more threads only contend for the interpreter (10.9 s with 1, 14.1 s with 4).
THEIRS = Contender("huggingface", ("--num-threads", "1", "--disable-cache"))
OURS = Contender("flexgen", (*THEIRS.arguments, "--runner-class-name", RUNNER))


def run(contender: Contender, run_entry: str, model_folder: Path, output: Path, *, instances: int, threads: int) -> Finished:
    """Run one entry with a command of its own.

    Args:
        contender: The side that answers.
        run_entry: Without a model.
        model_folder: Weights and tokenizer of both sides.
        output: HELM's output folder; made.
        instances: HELM's ``--max-eval-instances``.
        threads: Number of PyTorch's threads.

    Raises:
        FlexGenError: The command failed, or there is no data for the entry.
    """
    install_helm_data(output)
    write_deployments(output / "prod_env", model_folder)
    entry = f"{run_entry},model={contender.prefix}/{ORGANIZATION}/{model_folder.name}"
    arguments = [*contender.arguments, "--max-eval-instances", str(instances)]
    return helm_run([entry], output, arguments, threads=threads, watch="main")


def write_deployments(local_path: Path, model_folder: Path) -> None:
    """Describe both deployments in HELM's files: float32, CPU, no chat template, tokenizer loaded once."""
    limits = read_limits(str(model_folder))
    name = f"{ORGANIZATION}/{model_folder.name}"
    where = {"pretrained_model_name_or_path": str(model_folder)}
    common = {"model_name": name, "max_sequence_length": limits.window}
    theirs = {
        "name": f"{THEIRS.prefix}/{name}",
        "tokenizer_name": name,
        "client_spec": {
            "class_name": HELMS_CLIENT,
            "args": {**where, "dtype": "float32", "device": "cpu", "apply_chat_template": False},
        },
    }
    ours = {
        "name": f"{OURS.prefix}/{name}",
        "client_spec": {
            "class_name": CLIENT,
            "args": {"name_or_path": str(model_folder), "dtype": "float32", "device": "cpu"},
        },
    }
    tokenizer = {
        "name": name,
        "tokenizer_spec": {"class_name": HELMS_TOKENIZER, "args": where},
        "end_of_text_token": limits.eos_token,
        "prefix_token": limits.bos_token,
    }
    metadata = {
        "name": name,
        "display_name": model_folder.name,
        "description": "The model of both sides.",
        "creator_organization_name": ORGANIZATION,
        "access": "open",
        "release_date": None,
        "tags": ["TEXT_MODEL_TAG", "FULL_FUNCTIONALITY_TEXT_MODEL_TAG"],
    }
    local_path.mkdir(parents=True, exist_ok=True)
    for kind, rows in (
        ("model_deployments", [common | theirs, common | ours]),
        ("tokenizer_configs", [tokenizer]),
    ):
        (local_path / f"{kind}.yaml").write_text(yaml.safe_dump({kind: rows}), encoding="utf-8")
    (local_path / "model_metadata.yaml").write_text(yaml.safe_dump({"models": [metadata]}), encoding="utf-8")

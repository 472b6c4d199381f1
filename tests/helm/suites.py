"""Run entries on any model: by client, by runner and by plain ``transformers``, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from helm.benchmark.model_deployment_registry import (
    ClientSpec,
    ModelDeployment,
    WindowServiceSpec,
    get_model_deployment,
    register_model_deployment,
)
from helm.benchmark.presentation.run_entry import RunEntry
from helm.benchmark.run import run_entries_to_run_specs
from helm.benchmark.runner import Runner
from helm.benchmark.tokenizer_config_registry import TokenizerConfig, TokenizerSpec, register_tokenizer_config
from transformers import AutoTokenizer

import flexgen_helm.plugin  # noqa: F401  registers the generators of deployments
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.runner import FlexGenRunner
from tests.helm.agreement import Agreement
from tests.helm.conftest import execution_spec
from tests.helm.files import read, timeless
from tests.helm.reference import context_of


def run_entries(
    entries: Sequence[str], deployment: str, runner: type[Runner], output: Path, instances: int, *, parallelism: int = 4
) -> list[Path]:
    """Runs entries as helm-run does and returns the folder of each."""
    run_specs = run_entries_to_run_specs(
        [RunEntry(f"{entry},model=text") for entry in entries],
        max_eval_instances=instances,
        models_to_run=[deployment],
    )
    suite = "-".join([runner.__name__, deployment.split("/")[0], deployment.rsplit("/", 1)[-1]])
    spec = execution_spec(output / suite, parallelism=parallelism, sqlite_cache_backend_config=None)
    runner(
        spec,
        str(output),
        suite,
        skip_instances=False,
        # Making the instances of synthetic_reasoning takes longer than answering a few of them.
        cache_instances=True,
        cache_instances_only=False,
        skip_completed_runs=False,
        exit_on_error=True,
    ).run_all(run_specs)
    return [output / "runs" / suite / run_spec.name for run_spec in run_specs]


def reference_deployment(model_folder: Path) -> str:
    """Registers the reference, with a tokenizer and a window service that know nothing of ours."""
    name, tokenizer = f"plain/{model_folder.name}", AutoTokenizer.from_pretrained(model_folder)
    spec = TokenizerSpec(
        "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer", {"pretrained_model_name_or_path": str(model_folder)}
    )
    register_tokenizer_config(TokenizerConfig(name, spec, tokenizer.eos_token, tokenizer.bos_token or tokenizer.eos_token))
    window = context_of(str(model_folder)) - tokenizer.num_special_tokens_to_add()
    register_model_deployment(
        ModelDeployment(
            name,
            ClientSpec("tests.helm.reference.ReferenceClient", {"folder": str(model_folder)}),
            tokenizer_name=name,
            window_service_spec=WindowServiceSpec("tests.helm.reference.ReferenceWindowService"),
            # A document's first window has room for the prefix token.
            max_sequence_length=window - 1,
            max_request_length=window,
        )
    )
    return name


def deployment_with(policy: dict[str, int], model_folder: Path) -> str:
    """Registers the generated deployment once more, with row sizes that client and runner share."""
    flexgen = get_model_deployment(f"flexgen/{model_folder}")
    name = f"small/{model_folder.name}"
    client = ClientSpec(CLIENT, {**flexgen.client_spec.args, "policy": policy})
    register_model_deployment(replace(flexgen, name=f"flexgen/{name}", model_name=name, client_spec=client))
    return f"flexgen/{name}"


def assert_equal_transformers(
    entries: Sequence[str], model_folder: Path, output: Path, instances: int, *, policy: dict[str, int] | None = None
) -> None:
    """Compares runner and client with the reference, and with each other where a policy gives them equal row sizes."""
    deployment = deployment_with(policy, model_folder) if policy else f"flexgen/{model_folder}"
    reference = run_entries(entries, reference_deployment(model_folder), Runner, output, instances, parallelism=1)
    by_runner = run_entries(entries, deployment, FlexGenRunner, output, instances)
    by_client = run_entries(entries, deployment, Runner, output, instances)
    failures = []
    for runner, client, expected in zip(by_runner, by_client, reference, strict=True):
        for run in (runner, client):
            agreement = Agreement()
            agreement.add_run(run, expected)
            print(f"{run.parent.name} {run.name}: {agreement}")
            failures += agreement.failures
        states = [timeless(read(run, "", "scenario_state.json")) for run in (runner, client)]
        assert policy is None or states[0] == states[1]
    assert not failures, "\n".join(failures[:5])

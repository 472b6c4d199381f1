"""The run entries of the quickstart on any model: by client, by runner and by plain ``transformers``, compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helm.benchmark.model_deployment_registry import (
    ClientSpec,
    ModelDeployment,
    get_model_deployment,
    register_model_deployment,
)
from helm.benchmark.presentation.run_entry import read_run_entries
from helm.benchmark.run import run_entries_to_run_specs
from helm.benchmark.runner import Runner

import flexgen_helm.plugin  # noqa: F401  registers the generators of deployments
from flexgen_helm.helm.deployment import CLIENT
from flexgen_helm.helm.runner import FlexGenRunner
from flexgen_helm.runs.quickstart.commands import suite_file
from tests.helm.conftest import execution_spec
from tests.helm.files import read, timeless
from tests.reference import PROMPT_TOLERANCE, TOKEN_TOLERANCE

RUNS = (
    "commonsense:dataset=piqa,method=multiple_choice_separate_original",
    "mmlu:subject=anatomy,method=multiple_choice_joint",
    "synthetic_reasoning:mode=pattern_match",
)


def run_quickstart(deployment: str, runner: type[Runner], output: Path, instances: int, *, parallelism: int = 4) -> Path:
    """Runs the entries of the quickstart and returns the suite's folder."""
    entries = read_run_entries([str(suite_file("run_entries.conf"))]).entries
    run_specs = run_entries_to_run_specs(entries, max_eval_instances=instances, models_to_run=[deployment])
    suite = "-".join([runner.__name__, str(instances), deployment.split("/")[0], deployment.rsplit("/", 1)[-1]])
    spec = execution_spec(output / suite, parallelism=parallelism, sqlite_cache_backend_config=None)
    runner(
        spec,
        str(output),
        suite,
        skip_instances=False,
        cache_instances=False,
        cache_instances_only=False,
        skip_completed_runs=False,
        exit_on_error=True,
    ).run_all(run_specs)
    return output / "runs" / suite


def reference_suite(model_folder: Path, output: Path, instances: int) -> Path:
    """Runs the entries with the reference client, once for a model and a number of instances."""
    suite = output / "runs" / f"Runner-{instances}-plain-{model_folder.name}"
    if not suite.exists():
        flexgen = get_model_deployment(f"flexgen/{model_folder}")
        client = ClientSpec("tests.helm.reference.ReferenceClient", {"folder": str(model_folder)})
        register_model_deployment(
            ModelDeployment(
                f"plain/{model_folder.name}",
                client,
                tokenizer_name=flexgen.tokenizer_name,
                window_service_spec=flexgen.window_service_spec,
                max_sequence_length=flexgen.max_sequence_length,
            )
        )
        run_quickstart(f"plain/{model_folder.name}", Runner, output, instances, parallelism=1)
    return suite


def assert_equal_instances(suite: Path, reference: Path) -> None:
    """Compares every request with its answer and every statistic of every instance."""
    for run in RUNS:
        (name,) = [path.name for path in suite.glob(f"{run},model=*")]
        (expected_name,) = [path.name for path in reference.glob(f"{run},model=*")]
        for file in ("scenario_state.json", "per_instance_stats.json"):
            actual, expected = (timeless(read(*at, file)) for at in ((suite, name), (reference, expected_name)))
            # Whole texts, so that a difference is shown in words before it is shown in numbers.
            assert _without_numbers(actual) == _without_numbers(expected), (run, file)
            _assert_close(actual, expected, (run, file))


def _without_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        # The names of the deployments differ on purpose.
        skipped = ("model", "model_deployment")
        return {key: _without_numbers(item) for key, item in value.items() if key not in skipped}
    if isinstance(value, list):
        return [_without_numbers(item) for item in value]
    return None if _is_number(value) else value


def _is_number(value: Any) -> bool:
    # HELM writes a variance as 0 or 0.0, by the last digits of what it is the variance of.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _assert_close(actual: Any, expected: Any, where: tuple[Any, ...]) -> None:
    if isinstance(actual, dict):
        tolerance = TOKEN_TOLERANCE if "commonsense" not in where[0] else PROMPT_TOLERANCE
        if "tokens" in actual:
            for ours, theirs in zip(actual["tokens"], expected["tokens"], strict=True):
                assert abs(ours["logprob"] - theirs["logprob"]) <= tolerance, (where, ours, theirs)
        for key in actual:
            if key != "tokens":
                _assert_close(actual[key], expected[key], (*where, key))
    elif isinstance(actual, list):
        for ours, theirs in zip(actual, expected, strict=True):
            _assert_close(ours, theirs, where)
    elif _is_number(actual):
        # Sums and squares of sums over at most 400 tokens. Counts are equal if they are this close.
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-3), where


def assert_client_and_runner_equal_transformers(model_folder: Path, output: Path, instances: int) -> None:
    """Runs the entries through the client and through the runner, with equal row sizes."""
    flexgen = get_model_deployment(f"flexgen/{model_folder}")
    name, policy = f"small/{model_folder.name}", {"gpu_batch_size": 16, "gpu_batch_tokens": 64}
    client = ClientSpec(CLIENT, {**flexgen.client_spec.args, "policy": policy})
    register_model_deployment(replace(flexgen, name=f"flexgen/{name}", model_name=name, client_spec=client))
    reference = reference_suite(model_folder, output, instances)
    suites = [run_quickstart(f"flexgen/{name}", runner, output, instances) for runner in (FlexGenRunner, Runner)]
    for suite in suites:
        assert_equal_instances(suite, reference)
    # The same row sizes: client and runner agree to the last bit.
    for run in RUNS:
        by_runner, by_client = (read(suite, f"{run},model={name.replace('/', '_')}", "scenario_state.json") for suite in suites)
        assert timeless(by_runner) == timeless(by_client)

"""The quickstart on SmolLM2: by client and by runner, every instance equals plain ``transformers``."""

from __future__ import annotations

from pathlib import Path

import pytest
from helm.benchmark.runner import Runner

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.helm.runner import FlexGenRunner
from tests.helm.suites import (
    assert_client_and_runner_equal_transformers,
    assert_equal_instances,
    reference_suite,
    run_quickstart,
)

pytestmark = [pytest.mark.timeout(3600), pytest.mark.usefixtures("close_engine")]


@pytest.fixture(scope="module")
def model_folder() -> Path:
    try:
        return smollm2_folder()
    except CorruptFile:
        raise
    except FlexGenError as error:
        pytest.skip(str(error))


def test_few_instances_equal_plain_transformers(model_folder: Path, helm_output: Path) -> None:
    assert_client_and_runner_equal_transformers(model_folder, helm_output, 2)


@pytest.mark.slow
@pytest.mark.parametrize("runner", [FlexGenRunner, Runner])
def test_all_instances_equal_plain_transformers(runner: type[Runner], model_folder: Path, helm_output: Path) -> None:
    reference = reference_suite(model_folder, helm_output, 100)
    assert_equal_instances(run_quickstart(f"flexgen/{model_folder}", runner, helm_output, 100), reference)

"""`policy: auto` in deployments, and the jobs for which a policy is searched."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen_helm.errors import PolicyError
from flexgen_helm.helm.deployment import parse_arguments
from flexgen_helm.types import Policy
from tests.helm.conftest import RunSuite
from tests.helm.fakes import FakeLoader, run_spec


@pytest.mark.parametrize(
    ("written", "policy"),
    [({"policy": "auto"}, None), ({}, None), ({"policy": {"auto": True, "prefetch": 2}}, Policy(auto=True, prefetch=2))],
)
def test_a_deployment_may_ask_for_it(written: dict[str, Any], policy: Policy | None) -> None:
    assert parse_arguments({"name_or_path": "letters", **written}).get("policy") == policy


def test_auto_is_true_or_false() -> None:
    with pytest.raises(PolicyError, match="auto must be true or false"):
        parse_arguments({"name_or_path": "letters", "policy": {"auto": "yes"}})


def test_a_policy_is_searched_for_the_requests_without_an_answer(run_suite: RunSuite, loader: FakeLoader) -> None:
    run_suite([run_spec()])
    assert loader.workload == loader.engine.runs[0]
    assert len(loader.workload) == 3

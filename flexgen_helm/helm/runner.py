"""HELM runner that makes one workload of the requests of all run entries."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from functools import partial
from itertools import islice

from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.model_deployment_registry import get_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner, RunnerError
from helm.common.cache_backend_config import BlackHoleCacheBackendConfig, CacheBackendConfig
from helm.common.general import write
from helm.common.hierarchical_logger import hlog, htrack_block, hwarn
from helm.common.request import RequestResult
from tqdm import tqdm

from flexgen_helm.helm.cache import ResponseCache
from flexgen_helm.helm.deployment import is_flexgen
from flexgen_helm.helm.pausing import PausableRun
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.workload import WorkloadReport, serve

REPORT_FILE = "flexgen_workload.json"
"""In the suite's folder: one entry for each deployment that was served, see ``WorkloadReport``."""


class FlexGenRunner(Runner):
    """Runs a suite: all entries are adapted, each flexgen deployment serves its requests at once, then come metrics.

    Use it with ``helm-run --runner-class-name flexgen_helm.helm.runner.FlexGenRunner``. Everything but the order of
    these steps is HELM's own: options, files, errors, and entries of other vendors' deployments.
    """

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run all entries.

        Raises:
            RunnerError: Runs have failed; the others are complete. With ``exit_on_error`` the first error is raised.
        """
        failed: list[str] = []
        reports: list[WorkloadReport] = []
        paused: list[PausableRun] = []
        try:
            for run_spec in tqdm(run_specs, desc="Adapting", disable=None):
                run = PausableRun(self, run_spec, self._collects)
                self._attempt(f"Adapting {run_spec.name}", [run], failed, run.start)
                if run.paused:
                    paused.append(run)
            for deployment, runs in _by_deployment(paused).items():
                self._serve(deployment, runs, failed, reports)
        finally:
            for run in paused:
                run.abandon()
            self._write_reports(reports)
        if failed:
            names = ", ".join(f'"{run_spec.name}"' for run_spec in run_specs if run_spec.name in failed)
            raise RunnerError(f"Failed runs: [{names}]")

    def _collects(self, scenario_state: ScenarioState) -> bool:
        """Whether requests wait for the rest of the suite; the alternative is HELM's executor, at once."""
        if self.dry_run or not scenario_state.request_states:
            return False
        if not is_flexgen(get_model_deployment(scenario_state.adapter_spec.model_deployment)):
            return False
        if self.executor.execution_spec.url:
            hwarn("--server-url is set, so requests go to that server one by one, not to an engine in this process.")
            return False
        return True

    def _attempt(self, what: str, runs: list[PausableRun], failed: list[str], action: Callable[[], None]) -> bool:
        """Do one step of some runs; report an error as HELM does."""
        try:
            with htrack_block(what):
                action()
        except Exception:
            if self.exit_on_error:
                raise
            for run in runs:
                hlog(f"Error when running {run.run_spec.name}:\n{traceback.format_exc()}")
                failed.append(run.run_spec.name)
            return False
        return True

    def _serve(self, deployment_name: str, runs: list[PausableRun], failed: list[str], reports: list[WorkloadReport]) -> None:
        """Answer the requests of all runs of a deployment and finish these runs."""
        deployment = get_model_deployment(deployment_name)
        requests = [state.request for run in runs for state in run.request_states]
        cache = ResponseCache(self._cache_backend.get_cache_config(deployment.host_organization), ENGINES.cache_lock)
        results: list[RequestResult] = []

        def answer() -> None:
            answers, report = serve(deployment, requests, cache, ENGINES)
            results.extend(answers)
            reports.append(report)

        if self._attempt(f"Serving {len(runs)} runs of {deployment_name}", runs, failed, answer):
            remaining = iter(results)
            for run in runs:
                own = list(islice(remaining, len(run.request_states)))
                self._attempt(f"Running {run.run_spec.name}", [run], failed, partial(run.resume, own))

    @property
    def _cache_backend(self) -> CacheBackendConfig:
        spec = self.executor.execution_spec
        return spec.sqlite_cache_backend_config or spec.mongo_cache_backend_config or BlackHoleCacheBackendConfig()

    def _write_reports(self, reports: list[WorkloadReport]) -> None:
        if reports:
            path = os.path.join(self.runs_path, REPORT_FILE)
            write(path, json.dumps([report.as_dict() for report in reports], indent=2))


def _by_deployment(runs: list[PausableRun]) -> dict[str, list[PausableRun]]:
    groups: dict[str, list[PausableRun]] = {}
    for run in runs:
        groups.setdefault(run.run_spec.adapter_spec.model_deployment, []).append(run)
    return groups

"""HELM runner that makes one workload of the requests of all run entries."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.model_deployment_registry import ModelDeployment, get_model_deployment
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner, RunnerError
from helm.common.cache_backend_config import BlackHoleCacheBackendConfig, CacheBackendConfig
from helm.common.hierarchical_logger import hlog, htrack_block, hwarn
from helm.common.request import Request

from flexgen_helm.errors import DiskFull, FlexGenError
from flexgen_helm.helm.console import SPEAKER, Console
from flexgen_helm.helm.deployment import is_flexgen
from flexgen_helm.helm.disk_errors import RESUME, is_disk_full
from flexgen_helm.helm.journal import FOLDER, Journal
from flexgen_helm.helm.pausing import PausableRun
from flexgen_helm.helm.plain_errors import PlainErrors, described
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.requests import to_job
from flexgen_helm.helm.run_record import WORKLOAD_FILE, run_report, with_entry
from flexgen_helm.helm.shared_file import rewrite
from flexgen_helm.helm.workload import EngineServer, Served, Server, serve
from flexgen_helm.helm.written import check_deployment
from flexgen_helm.machine.identity import environment

T = TypeVar("T")
INTERRUPTED = 130
"""Exit status of a shell's commands that Ctrl-C has ended."""
MOST_CAUSE = 500
"""Characters of each cause; some quote a request at their end."""


class FlexGenRunner(Runner):
    """Runs a suite: all entries are adapted, each flexgen deployment serves its requests at once, then come metrics.

    Use it with ``helm-run --runner-class-name flexgen_helm.helm.runner.FlexGenRunner``. Everything but the order of
    these steps is HELM's own: options, files, errors, and entries of other vendors' deployments. Answers are kept in a
    journal in the suite's folder until all runs are complete: the same command goes on where a killed one stopped.
    """

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run all entries as ``helm-run`` does: like `run_here`, but Ctrl-C ends the process, with one line."""
        PlainErrors.install()
        try:
            self.run_here(run_specs)
        except KeyboardInterrupt:
            print(f"{SPEAKER}interrupted. {RESUME}", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None

    def run_here(self, run_specs: list[RunSpec]) -> None:
        """Run all entries.

        Raises:
            RunnerError: Runs have failed; the others are complete. With ``exit_on_error`` the first error is raised.
            FlexGenError: Two different runs have the same name, or another process works on the same runs.
            DiskFull: There is no space left; nothing further is tried.
        """
        run_specs = _distinct(run_specs)
        failed = self._run_all(run_specs)
        if failed:
            names = ", ".join(f'"{run_spec.name}"' for run_spec in run_specs if run_spec.name in failed)
            raise RunnerError(f"Failed runs: [{names}]. {_causes(failed)}")

    def _run_all(self, run_specs: list[RunSpec]) -> dict[str, Exception]:
        """Run all entries and return why those that have failed did, by name."""
        failed: dict[str, Exception] = {}
        paused: list[PausableRun] = []
        with Journal(Path(self.runs_path) / FOLDER, [run_spec.name for run_spec in run_specs]) as journal:
            try:
                for run_spec in self.console.each(run_specs, f"Adapting {len(run_specs)} runs"):
                    run = PausableRun(self, run_spec, self._collects, journal.unfinished)
                    if not self._skips(run_spec):
                        self._attempt(f"Adapting {run_spec.name}", [run], failed, partial(self._start, run))
                    if run.paused:
                        paused.append(run)
                for name, runs in _by_deployment(paused).items():
                    self._serve(get_model_deployment(name), runs, failed, journal)
                if not failed:
                    journal.discard()
            finally:
                for run in paused:
                    run.abandon()
                journal.remove_empty_folders()
        return failed

    def requests_of(self, run_spec: RunSpec, folder: Path) -> list[Request]:
        """Return the requests of one entry, of which none is sent, and which leaves no file of results.

        Args:
            run_spec: The entry.
            folder: For files while this lasts.

        Raises:
            FlexGenError: The entry is for a deployment that is not served by this package, or asks nothing.
        """
        run = PausableRun(self, run_spec, self._must_collect, folder)
        try:
            self._start(run)
            return [state.request for state in run.request_states]
        finally:
            run.abandon()

    def _must_collect(self, scenario_state: ScenarioState) -> bool:
        if not self._collects(scenario_state):
            raise FlexGenError("No request of this run entry would reach an engine of flexgen_helm.")
        return True

    def server(self, journal: Journal) -> Server:
        """Return what answers requests that are not known yet; subclasses may do it elsewhere than in this process."""
        return EngineServer(ENGINES, journal, self.console)

    def _start(self, run: PausableRun) -> None:
        """Adapt a run, if its deployment is written as it should be."""
        check_deployment(run.run_spec.adapter_spec.model_deployment, self.executor.execution_spec.local_path)
        run.start()

    def _skips(self, run_spec: RunSpec) -> bool:
        """Return whether --skip-completed-runs is set and the run is complete, as HELM's runner does."""
        skips = self.skip_completed_runs and self._is_run_completed(self._get_run_path(run_spec))
        if skips:
            hlog(f"Skipping run {run_spec.name} because run is completed and all output files exist.")
        return bool(skips)

    def _collects(self, scenario_state: ScenarioState) -> bool:
        """Whether requests wait for the rest of the suite; the alternative is HELM's executor, at once.

        Raises:
            InvalidJob: A request has a field that cannot be honoured, which is said before any is computed.
        """
        if self.dry_run or not scenario_state.request_states:
            return False
        if not is_flexgen(get_model_deployment(scenario_state.adapter_spec.model_deployment)):
            return False
        if self.executor.execution_spec.url:
            hwarn("--server-url is set, so requests go to that server one by one, not to an engine in this process.")
            return False
        for state in scenario_state.request_states:
            to_job(state.request)
        return True

    def _attempt(self, what: str, runs: list[PausableRun], failed: dict[str, Exception], action: Callable[[], T]) -> T | None:
        """Do one step of some runs and return what it returns; report an error as HELM does."""
        try:
            with htrack_block(what):
                return action()
        except Exception as error:
            if is_disk_full(error) and not isinstance(error, DiskFull):
                raise DiskFull(f"{what}: {error}. Free some space. {RESUME}") from error
            if self.exit_on_error or isinstance(error, DiskFull):
                raise
            names = [run.run_spec.name for run in runs]
            hlog(f"Error when running {', '.join(names)}:\n{described(error)}")
            failed |= dict.fromkeys(names, error)
            return None

    def _serve(
        self, deployment: ModelDeployment, runs: list[PausableRun], failed: dict[str, Exception], journal: Journal
    ) -> None:
        """Answer the requests of all runs of a deployment and finish these runs."""
        requests = [state.request for run in runs for state in run.request_states]

        def answer() -> Served:
            cache = ENGINES.caches.get(self.cache_backend.get_cache_config(deployment.host_organization))
            served = serve(deployment, requests, cache, journal, self.server(journal), self.console)
            entry = served.report.as_dict([run.run_spec.name for run in runs])
            rewrite(Path(self.runs_path) / WORKLOAD_FILE, partial(with_entry, entry=entry))
            return served

        served = self._attempt(f"Serving {len(runs)} runs of {deployment.name}", runs, failed, answer)
        if served is None:
            return
        machine = environment(torch.device(served.report.engine.numerics.machine.device))
        remaining = zip(served.results, served.sources, strict=True)
        for run in self.console.each(runs, f"Metrics of {len(runs)} runs"):
            results, sources = zip(*islice(remaining, len(run.request_states)), strict=True)
            report = run_report(deployment, served.report, sources, machine)
            self._attempt(f"Running {run.run_spec.name}", [run], failed, partial(run.resume, list(results), report))

    @cached_property
    def console(self) -> Console:
        """Where progress is shown: what the process was given, unless another console is assigned before the first use."""
        return Console.of_process()

    @property
    def cache_backend(self) -> CacheBackendConfig:
        """HELM's caches of answers."""
        spec = self.executor.execution_spec
        return spec.sqlite_cache_backend_config or spec.mongo_cache_backend_config or BlackHoleCacheBackendConfig()


def _distinct(run_specs: list[RunSpec]) -> list[RunSpec]:
    """Drop repeated runs.

    Raises:
        FlexGenError: Two different runs have the same name.
    """
    by_name: dict[str, RunSpec] = {}
    for run_spec in run_specs:
        if by_name.setdefault(run_spec.name, run_spec) != run_spec:
            deployments = [spec.adapter_spec.model_deployment for spec in (by_name[run_spec.name], run_spec)]
            raise FlexGenError(
                f'Two different runs have the name "{run_spec.name}" and would write over each other (deployments: '
                f"{' and '.join(deployments)}). HELM names runs by the last two parts of a model's name: run them in two "
                "suites, or write `model_deployment=` in place of `model=`, which puts the whole name into the run's."
            )
    return list(by_name.values())


def _by_deployment(runs: list[PausableRun]) -> dict[str, list[PausableRun]]:
    groups: dict[str, list[PausableRun]] = {}
    for run in runs:
        groups.setdefault(run.run_spec.adapter_spec.model_deployment, []).append(run)
    return groups


def _causes(failed: Mapping[str, Exception]) -> str:
    """Say in one line why runs have failed, for the end of a long log; each cause once."""
    texts: dict[str, list[str]] = {}
    for name, error in failed.items():
        text = " ".join(f"{type(error).__name__}: {error}".split())
        texts.setdefault(text if len(text) <= MOST_CAUSE else f"{text[:MOST_CAUSE]}...", []).append(name)
    return "; ".join(f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {text}" for text, names in texts.items())

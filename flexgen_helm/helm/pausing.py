"""HELM's ``Runner.run_one`` paused where it would send its requests."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import Executor, ExecutorError
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.common.request import RequestResult

from flexgen_helm.helm.run_record import RUN_FILE, keep_measured

LAST_FILE = "per_instance_stats.json"
"""The last file that HELM writes."""


class PausingExecutor(Executor):
    """HELM's executor, whose ``execute`` may wait until the requests of the whole suite have been served."""

    def __init__(
        self,
        executor: Executor,
        pauses_for: Callable[[ScenarioState], bool],
        pause: Callable[[ScenarioState], ScenarioState],
    ) -> None:
        """Args: pauses_for: Whether to pause; other requests go through ``executor``. pause: Waits for the answers."""
        # Not the constructor of the base class, which would open a second connection to HELM's services.
        self.execution_spec = executor.execution_spec
        self.context = executor.context
        self._executor = executor
        self._pauses_for = pauses_for
        self._pause = pause

    def execute(self, scenario_state: ScenarioState) -> ScenarioState:
        """Return the state with results."""
        if self._pauses_for(scenario_state):
            return self._pause(scenario_state)
        answered: ScenarioState = self._executor.execute(scenario_state)
        return answered


class PausableRun:
    """One run entry, whose requests can be read before they are answered, and whose files appear when they are complete.

    HELM adapts, executes, evaluates and writes a run in one function. It is called unchanged in a greenlet, which pauses
    while others adapt: threads would do as well, if HELM imported no module that wants to be in the main thread. Each
    run finds the global random state as it left it, so files are the same as if the runs had followed each other.
    HELM takes a run whose files exist for complete, so they are written elsewhere and moved when all of them are there.
    """

    def __init__(self, runner: Runner, run_spec: RunSpec, pauses_for: Callable[[ScenarioState], bool], folder: Path) -> None:
        """Args: runner: Provides ``run_one``. pauses_for: Whether a run is to be paused. folder: Of unfinished runs."""
        self.run_spec = run_spec
        self.request_states: list[RequestState] = []
        """While paused: the requests that wait for results."""
        self._unfinished, self._finished = folder / run_spec.name, Path(runner.runs_path) / run_spec.name
        self._runner = copy.copy(runner)
        self._runner.runs_path = str(folder)
        self._runner.executor = PausingExecutor(runner.executor, pauses_for, self._pause)
        self._greenlet = greenlet(self._run)

    @property
    def paused(self) -> bool:
        """Whether the run waits for answers."""
        return bool(self._greenlet)

    def start(self) -> None:
        """Run until the requests are known or the run has ended; raises what the run raised."""
        self._greenlet.switch()

    def resume(self, results: list[RequestResult], report: dict[str, Any]) -> None:
        """Run from the answers to the end; raises what the run raised.

        Args:
            results: In the order of ``request_states``.
            report: For ``flexgen.json``.
        """
        self._unfinished.mkdir(parents=True, exist_ok=True)
        report = keep_measured(report, _read_report(self._finished / RUN_FILE))
        (self._unfinished / RUN_FILE).write_text(json.dumps(report, indent=2))
        self._greenlet.switch(results)

    def abandon(self) -> None:
        """End the run if it is paused."""
        if self.paused:
            self._greenlet.throw()

    def _run(self) -> None:
        # Not the method of a subclass, which may itself make pausable runs.
        try:
            Runner.run_one(self._runner, self.run_spec)
            self._publish()
        finally:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def _publish(self) -> None:
        """Move the files, the one last without which HELM takes no run for complete."""
        self._finished.mkdir(parents=True, exist_ok=True)
        if not (self._unfinished / LAST_FILE).exists():
            return  # with some of its options HELM writes nothing
        (self._finished / LAST_FILE).unlink(missing_ok=True)
        (self._finished / RUN_FILE).unlink(missing_ok=True)  # of a run that another client served
        for path in sorted(self._unfinished.iterdir(), key=lambda path: path.name == LAST_FILE):
            path.replace(self._finished / path.name)

    def _pause(self, scenario_state: ScenarioState) -> ScenarioState:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        self.request_states = scenario_state.request_states
        results: list[RequestResult] = getcurrent().parent.switch()
        self.request_states = []
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        return _answered(scenario_state, results)


def _read_report(path: Path) -> dict[str, Any]:
    """Return an earlier command's report, nothing where there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _answered(scenario_state: ScenarioState, results: list[RequestResult]) -> ScenarioState:
    """Return the state with results.

    Raises:
        ExecutorError: A request failed; as in HELM, one is enough to lose the run.
    """
    states = list(zip(scenario_state.request_states, results, strict=True))
    failures = [(state, result) for state, result in states if not result.success]
    if failures:
        state, result = failures[0]
        raise ExecutorError(f"{result.error} ({len(failures)} of {len(states)} requests failed.) {state.request}")
    return replace(scenario_state, request_states=[replace(state, result=result) for state, result in states])

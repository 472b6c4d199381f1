"""HELM's ``Runner.run_one`` paused where it would send its requests."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

import numpy as np
from helm.benchmark.adaptation.request_state import RequestState
from helm.benchmark.adaptation.scenario_state import ScenarioState
from helm.benchmark.executor import Executor, ExecutorError
from helm.benchmark.run_spec import RunSpec
from helm.benchmark.runner import Runner
from helm.common.request import RequestResult

Pause = Callable[[ScenarioState], ScenarioState]


class RunAbandoned(BaseException):
    """Ends a paused run that will not be resumed; no exception that HELM would handle."""


class PausingExecutor(Executor):
    """HELM's executor, whose ``execute`` may wait until the requests of the whole suite have been served."""

    def __init__(self, executor: Executor, pauses_for: Callable[[ScenarioState], bool], pause: Pause) -> None:
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
    """One run entry, whose requests can be read before they are answered.

    HELM adapts, executes, evaluates and writes a run in one function. It runs unchanged in a thread of its own, which
    rests while others adapt. Only one of these threads, or their creator, is ever active, and each finds the
    global random state as it left it, so files are the same as if the runs had followed each other.
    """

    def __init__(self, runner: Runner, run_spec: RunSpec, pauses_for: Callable[[ScenarioState], bool]) -> None:
        """Args: runner: Provides ``run_one``. pauses_for: Whether a run is to be paused."""
        self.run_spec = run_spec
        self.paused = False
        self.request_states: list[RequestState] = []
        """While paused: the requests that wait for results."""
        self._answers: SimpleQueue[list[RequestResult] | RunAbandoned] = SimpleQueue()
        self._paused_or_ended: SimpleQueue[BaseException | None] = SimpleQueue()
        self._runner = copy.copy(runner)
        self._runner.executor = PausingExecutor(runner.executor, pauses_for, self._pause)
        self._thread = threading.Thread(target=self._run, name=f"run {run_spec.name}", daemon=True)

    def start(self) -> None:
        """Run until the requests are known or the run has ended; raises what the run raised."""
        self._thread.start()
        self._wait()

    def resume(self, results: list[RequestResult]) -> None:
        """Run from the answers to the end; raises what the run raised.

        Args:
            results: In the order of ``request_states``.
        """
        self._answers.put(results)
        self._wait()

    def abandon(self) -> None:
        """End the run if it is paused."""
        if self.paused:
            self._answers.put(RunAbandoned())
            self._thread.join()

    def _wait(self) -> None:
        error = self._paused_or_ended.get()
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            # Not the method of a subclass, which may itself make pausable runs.
            Runner.run_one(self._runner, self.run_spec)
        except BaseException as error:
            self._paused_or_ended.put(error)
        else:
            self._paused_or_ended.put(None)

    def _pause(self, scenario_state: ScenarioState) -> ScenarioState:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        self.request_states, self.paused = scenario_state.request_states, True
        self._paused_or_ended.put(None)
        answer = self._answers.get()
        self.request_states, self.paused = [], False
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if isinstance(answer, RunAbandoned):
            raise answer
        return _answered(scenario_state, answer)


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

"""``helm-run``, watched: ``python -m flexgen_helm.runs.helm_overhead.sampled FILE main|all ARGUMENTS``.

Every few milliseconds the main thread's stack is looked up, and the time since the last look counts for the step of the
innermost function that belongs to one. With ``all``, functions of the engine's thread are timed as well. ``FILE`` gets the
seconds of each step as JSON.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache, wraps
from pathlib import Path
from types import FrameType
from typing import Any

INTERVAL_S = 0.005
START, LOADING, WAITING = "start", "loading", "waiting"
"""Configuration, before the runs. The model, self-check included. Waiting for other threads, such as the engine's."""
STEPS: dict[str, tuple[str, ...]] = {
    "imports": ("importlib._bootstrap:_find_and_load",),
    "scenario": (
        "helm.benchmark.scenarios.*:get_instances",
        "helm.benchmark.scenarios.scenario:create_scenario",
        "helm.benchmark.scenarios.scenario:with_instance_ids",
        "helm.benchmark.runner:downsample_eval_instances",
    ),
    "adaptation": ("helm.benchmark.adaptation.adapters.*:adapt", "helm.benchmark.data_preprocessor:preprocess"),
    LOADING: ("flexgen_helm.helm.registry:load_engine", "helm.clients.huggingface_client:get_server"),
    "conversion": (
        "flexgen_helm.helm.pausing:*",
        "flexgen_helm.helm.requests:*",
        "flexgen_helm.helm.workload:*",
        "flexgen_helm.runtime.engine:run",
        "flexgen_helm.runtime.run:*",
        "flexgen_helm.generation.prepare:*",
        "helm.benchmark.executor:*",
    ),
    "lookup": (
        "flexgen_helm.helm.response_cache:*",
        "flexgen_helm.helm.journal:*",
        "flexgen_helm.helm.requests:cache_key",
    ),
    "journal and cache": (
        "flexgen_helm.helm.response_cache:write",
        "flexgen_helm.helm.response_cache:put",
        "flexgen_helm.helm.journal:append",
        "flexgen_helm.helm.journal:_write",
        "flexgen_helm.helm.workload:_store",
    ),
    "layers": ("helm.clients.huggingface_client:serve_request",),
    "metrics": ("helm.benchmark.metrics.metric:create_metric", "helm.benchmark.metrics.*:evaluate"),
    # What is left of it when all that it calls is known: turning results into dictionaries, JSON, files.
    "writing": ("helm.benchmark.runner:run_one",),
    "rest of the runner": ("*:run_all",),
}
"""Functions of each step, as ``module:function``; ``*`` stands for anything."""
WAITS = ("threading:wait", "flexgen_helm.runtime.run:_finished")
"""Innermost Python functions of a main thread that waits for others."""
TIMED: dict[str, tuple[str, ...]] = {
    "conversion": ("flexgen_helm.runtime.intake:Intake.merge", "flexgen_helm.runtime.intake:Intake.result"),
    "scheduling": (
        "flexgen_helm.schedule.packed:PackedScheduler.add",
        "flexgen_helm.schedule.packed:PackedScheduler.next_sweep",
        "flexgen_helm.schedule.packed:PackedScheduler.end_sweep",
        "flexgen_helm.schedule.packed:PackedScheduler.tokens_left",
    ),
    "recording": ("flexgen_helm.rows.packed:PackedRows.reserve", "flexgen_helm.rows.packed:PackedRows.record"),
    "layers": ("flexgen_helm.execution.sweep_run:SweepRun.compute",),
    "logits": ("flexgen_helm.execution.serial:SerialExecutor._logits", "flexgen_helm.runtime.worker:Worker._on_logits"),
}
"""Methods that the engine's thread calls, none within another, as ``module:class.method``."""
OTHER = "other threads"
"""The rest of the engine's thread, and the sampler's."""


class Sampler:
    """Adds up wall clock and processor time of each step of the main thread.

    A thread gives the beat, by a signal. It must not read stacks itself: frames vanish under another thread's hands, most of
    all where greenlets are switched, as the runner does. SIGALRM is taken by HELM.
    """

    def __init__(self) -> None:
        """Start; call it from the main thread."""
        self.wall: dict[str, float] = defaultdict(float)
        self.processor: dict[str, float] = defaultdict(float)
        self._main = threading.get_ident()
        self._last = (time.perf_counter(), time.thread_time())
        self._stopped = threading.Event()
        signal.signal(signal.SIGUSR1, self._sample)
        self._beat = threading.Thread(target=self._signal, daemon=True)
        self._beat.start()

    def stop(self) -> None:
        """End."""
        self._stopped.set()
        self._beat.join()

    def _signal(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            signal.pthread_kill(self._main, signal.SIGUSR1)

    def _sample(self, _: int, frame: FrameType | None) -> None:
        now, step = (time.perf_counter(), time.thread_time()), step_of(frame)
        self.wall[step] += now[0] - self._last[0]
        self.processor[step] += now[1] - self._last[1]
        self._last = now


def time_methods(seconds: dict[str, float]) -> None:
    """Add the processor time of the methods ``TIMED`` to ``seconds``, for the rest of the process."""
    for step, names in TIMED.items():
        for name in names:
            module, _, path = name.partition(":")
            owner, method = path.split(".")
            cls = getattr(importlib.import_module(module), owner)
            setattr(cls, method, _timed(getattr(cls, method), step, seconds))


def _timed(function: Callable[..., Any], step: str, seconds: dict[str, float]) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if threading.current_thread() is threading.main_thread():  # the self-check, which is loading
            return function(*arguments, **keywords)
        start = time.thread_time()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[step] += time.thread_time() - start

    return call


def step_of(frame: FrameType | None) -> str:
    """Return the step of a stack, given by its innermost frame: the innermost that is known, but loading is loading."""
    if frame is not None and _name(frame) in WAITS:
        return WAITING
    found: list[str] = []
    while frame is not None:
        step = find_step(_name(frame))
        if step is not None:
            found.append(step)
        frame = frame.f_back
    return LOADING if LOADING in found else found[0] if found else START


@cache
def find_step(name: str) -> str | None:
    """Return the step of a function ``module:function``; the longest pattern decides."""
    found = [(len(pattern), step) for step, patterns in STEPS.items() for pattern in patterns if fnmatchcase(name, pattern)]
    return max(found)[1] if found else None


def _name(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '')}:{frame.f_code.co_name}"


def main() -> None:
    """Run the command."""
    target, watched = Path(sys.argv[1]), sys.argv[2]
    sys.argv[1:] = sys.argv[3:]
    engine: dict[str, float] = defaultdict(float)
    if watched == "all":
        time_methods(engine)
    sampler = Sampler()
    try:
        from helm.benchmark.run import main as helm_run

        helm_run()
    finally:
        sampler.stop()
        processor = {step: sampler.processor.get(step, 0.0) + engine.get(step, 0.0) for step in {*sampler.processor, *engine}}
        processor[OTHER] = time.process_time() - sum(processor.values())
        target.write_text(json.dumps({"wall": sampler.wall, "processor": processor}), encoding="utf-8")


if __name__ == "__main__":
    main()

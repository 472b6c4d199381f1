"""``helm-run``, watched: ``python -m flexgen_helm.runs.helm_overhead.sampled FILE main|all ARGUMENTS``.

Every few milliseconds the stacks of the main thread and (``all``) of the engine's are looked up, and the time since the last
look counts for the step of the innermost function that belongs to one. Nothing is patched. ``FILE`` gets the seconds of each
step as JSON.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections import defaultdict
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import FrameType

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
        "flexgen_helm.runtime.jobs:*",
        "flexgen_helm.runtime.intake:merge",
        "flexgen_helm.runtime.intake:result",
        "helm.benchmark.executor:*",
    ),
    "lookup": (
        "flexgen_helm.helm.cache:*",
        "flexgen_helm.helm.journal:*",
        "flexgen_helm.helm.requests:cache_key",
    ),
    "journal and cache": (
        "flexgen_helm.helm.cache:write",
        "flexgen_helm.helm.cache:put",
        "flexgen_helm.helm.journal:append",
        "flexgen_helm.helm.journal:_write",
        "flexgen_helm.helm.workload:_store",
    ),
    "scheduling": ("flexgen_helm.schedule.*:*", "flexgen_helm.runtime.worker:*", "flexgen_helm.runtime.engine:__call__"),
    "recording": ("flexgen_helm.runtime.packed:record", "flexgen_helm.runtime.packed:reserve"),
    "layers": ("flexgen_helm.runtime.executor:*", "helm.clients.huggingface_client:serve_request"),
    "logits": ("flexgen_helm.runtime.executor:_logits", "flexgen_helm.runtime.intake:answer"),
    "metrics": ("helm.benchmark.metrics.metric:create_metric", "helm.benchmark.metrics.*:evaluate"),
    # What is left of it when all that it calls is known: turning results into dictionaries, JSON, files.
    "writing": ("helm.benchmark.runner:run_one",),
    "rest of the runner": ("*:run_all",),
}
"""Functions of each step, as ``module:function``; ``*`` stands for anything."""
WORKER = "flexgen-helm"
"""Name of the engine's thread."""
WAITS = ("threading:wait", "flexgen_helm.runtime.engine:_run", "flexgen_helm.runtime.worker:_loop")
"""Innermost Python functions of a thread that waits for others."""


class Sampler:
    """Adds up wall clock and processor time of each step.

    A thread gives the beat, by a signal: it must not read the main thread's stack itself, because frames may vanish under it
    where greenlets are switched, as the runner does. SIGALRM is taken by HELM.
    """

    def __init__(self, *, with_worker: bool) -> None:
        """Start; call it from the main thread. In single rows the worker switches greenlets and must not be read."""
        self._with_worker = with_worker
        self._main = threading.get_ident()
        self._wall: dict[str, float] = defaultdict(float)
        self._processor: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()
        self._used: dict[int, float] = {}
        self._stopped = threading.Event()
        signal.signal(signal.SIGUSR1, self._sample)
        self._beat = threading.Thread(target=self._signal, daemon=True)
        self._beat.start()

    def stop(self) -> dict[str, dict[str, float]]:
        """End, and return the seconds of each step, by the clock and of the processor."""
        self._stopped.set()
        self._beat.join()
        return {"wall": self._wall, "processor": self._processor}

    def _signal(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            signal.pthread_kill(self._main, signal.SIGUSR1)

    def _sample(self, _: int, main: FrameType | None) -> None:
        frames = {self._main: main, **self._worker()}
        steps = {thread: step_of(frame) for thread, frame in frames.items()}
        # While the main thread waits it is the worker's step that takes the time, if anyone's.
        now, step = time.perf_counter(), next((step for step in steps.values() if step != WAITING), WAITING)
        self._wall[step] += now - self._last
        self._last = now
        for thread, step in steps.items():
            used = time.clock_gettime(time.pthread_getcpuclockid(thread))
            self._processor[step] += used - self._used.get(thread, 0.0)
            self._used[thread] = used

    def _worker(self) -> dict[int, FrameType | None]:
        threads = [thread.ident for thread in threading.enumerate() if thread.name == WORKER] if self._with_worker else []
        frames = sys._current_frames() if threads else {}
        return {thread: frames[thread] for thread in threads if thread in frames}


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
    sampler = Sampler(with_worker=watched == "all")
    try:
        from helm.benchmark.run import main as helm_run

        helm_run()
    finally:
        target.write_text(json.dumps(sampler.stop()), encoding="utf-8")


if __name__ == "__main__":
    main()

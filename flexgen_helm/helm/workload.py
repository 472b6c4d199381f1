"""The requests of many runs, served by one engine in one go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helm.benchmark.model_deployment_registry import ModelDeployment
from helm.common.hierarchical_logger import hlog, hwarn
from helm.common.key_value_store import request_to_key
from helm.common.request import Request, RequestResult

from flexgen_helm.errors import DiskFull, FlexGenError, InvalidJob, JobFailed
from flexgen_helm.helm.cache import ResponseCache
from flexgen_helm.helm.deployment import EngineArguments, parse_arguments
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.registry import EngineRegistry
from flexgen_helm.helm.report import Source, WorkloadReport
from flexgen_helm.helm.requests import (
    Response,
    Timing,
    cache_key,
    failure,
    to_job,
    to_request_result,
    to_response,
)
from flexgen_helm.types import Job, Policy, Result, RunStats

if TYPE_CHECKING:
    from flexgen_helm.runtime.engine import Engine


@dataclass(frozen=True)
class Served:
    """Answers in the order of the requests."""

    results: list[RequestResult]
    sources: list[Source]
    report: WorkloadReport


def serve(
    deployment: ModelDeployment,
    requests: Sequence[Request],
    cache: ResponseCache,
    journal: Journal,
    registry: EngineRegistry,
) -> Served:
    """Serve requests of one deployment.

    A request that cannot be served gets a failure as its result and does not disturb the others. Every answer is in
    the journal at the sweep in which it finishes, and in the cache afterwards, also when the engine fails or the user
    interrupts it.

    Raises:
        FlexGenError: No engine can be made of the deployment.
        DiskFull: Journal or cache cannot be written.
    """
    with registry.lease(_arguments(deployment, journal)) as engine:
        info = engine.describe()
        sizes = {name: getattr(info.policy, name) for name in ("gpu_batch_size", "gpu_batch_tokens")}
        journal.note_row_sizes(deployment.name, sizes)
        workload = _Workload(engine, cache, journal, requests)
        workload.run()
        sources, stats = workload.sources, workload.stats
        counts = (len(requests), sources.count("cached"), sources.count("resumed"))
        report = WorkloadReport(deployment.name, *counts, stats, info, _share_of_limit(engine, stats))
    hlog(report.summary())
    return Served(workload.results, sources, report)


def _arguments(deployment: ModelDeployment, journal: Journal) -> EngineArguments:
    """Return the deployment's arguments; what is resumed is resumed with the row sizes with which it began."""
    arguments, begun = parse_arguments(deployment.client_spec.args), journal.row_sizes(deployment.name)
    if arguments.get("policy") is None and begun is not None:
        hlog(f"{deployment.name} goes on with the row sizes of the journal: {begun}")
        arguments["policy"] = Policy(gpu_batch_size=begun["gpu_batch_size"], gpu_batch_tokens=begun["gpu_batch_tokens"])
    return arguments


def _share_of_limit(engine: Engine, stats: RunStats) -> float | None:
    try:
        return engine.share_of_limit(stats)
    except Exception as error:  # a figure is not worth the answers
        hwarn(f"How close the run came to its limit could not be measured: {error}")
        return None


class _Workload:
    """State of ``serve``."""

    def __init__(self, engine: Engine, cache: ResponseCache, journal: Journal, requests: Sequence[Request]) -> None:
        self._engine, self._cache, self._journal, self._requests = engine, cache, journal, requests
        self._results: dict[int, RequestResult] = {}
        self._sources: dict[int, Source] = {}
        self._keys: dict[int, str] = {}
        self.stats = RunStats()

    @property
    def results(self) -> list[RequestResult]:
        return [self._results[index] for index in range(len(self._requests))]

    @property
    def sources(self) -> list[Source]:
        return [self._sources[index] for index in range(len(self._requests))]

    def run(self) -> None:
        """Answer every request from the cache, from the journal or by the engine."""
        jobs = self._convert()
        numerics = self._engine.numerics
        self._keys = {index: request_to_key(cache_key(self._requests[index], job, numerics)) for index, job in jobs.items()}
        for index, stored in zip(jobs, self._cache.lookup([self._keys[index] for index in jobs]), strict=True):
            if stored is not None:
                self._settle(index, "cached", stored)
        resumed: dict[int, Response] = {}
        for index in (index for index in jobs if index not in self._results):
            found = self._journal.lookup(self._keys[index])
            if found is not None:
                resumed[index] = found
                self._settle(index, "resumed", found)
        self._store(resumed)
        missing = [index for index in jobs if index not in self._results]
        if missing:
            self._compute(missing, jobs)

    def _convert(self) -> dict[int, Job]:
        jobs = {}
        for index, request in enumerate(self._requests):
            try:
                jobs[index] = to_job(request)
            except InvalidJob as error:
                self._fail(index, error)
        return jobs

    def _compute(self, missing: list[int], jobs: dict[int, Job]) -> None:
        computed: dict[int, Response] = {}
        failed: dict[int, FlexGenError] = {}
        started = time.time()

        def timing() -> Timing:
            return Timing(started, time.time() - started, len(missing))

        def on_result(position: int, result: Result) -> None:
            index = missing[position]
            try:
                computed[index] = to_response(self._requests[index], result, timing())
            except Exception as error:  # of this request alone
                failed[index] = error if isinstance(error, FlexGenError) else JobFailed(f"{type(error).__name__}: {error}")
                return
            self._journal.append(self._keys[index], computed[index])

        try:
            self._engine.run([jobs[index] for index in missing], on_result=on_result, on_error="return")
            self.stats = self._engine.stats
        finally:
            whole = timing()  # how long the batch took is known only now
            computed = {index: _stamped(response, whole) for index, response in computed.items()}
            self._store(computed)
        for index in missing:
            if index in failed:
                self._fail(index, failed[index])
            else:
                self._settle(index, "computed", computed[index])

    def _store(self, responses: dict[int, Response]) -> None:
        try:
            self._cache.write((self._keys[index], response) for index, response in responses.items())
        except DiskFull:
            raise
        except FlexGenError as error:
            hwarn(f"Answers are not in HELM's cache, but in the journal until all runs are complete. {error}")

    def _settle(self, index: int, source: Source, response: Response) -> None:
        self._sources[index] = source
        self._results[index] = to_request_result(response, cached=source != "computed")

    def _fail(self, index: int, error: FlexGenError) -> None:
        self._sources[index] = "failed"
        self._results[index] = failure(error)


def _stamped(response: Response, timing: Timing) -> Response:
    """Return an answer with other times."""
    return {
        **response,
        "request_time": timing.seconds / timing.batch_size,
        "batch_request_time": timing.seconds,
    }

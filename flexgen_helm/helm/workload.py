"""The requests of many runs, served by one engine in one go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from helm.benchmark.model_deployment_registry import ModelDeployment
from helm.common.hierarchical_logger import hlog
from helm.common.request import Request, RequestResult

from flexgen_helm.errors import FlexGenError, InvalidJob
from flexgen_helm.helm.cache import Key, ResponseCache
from flexgen_helm.helm.deployment import parse_arguments
from flexgen_helm.helm.registry import EngineRegistry
from flexgen_helm.helm.requests import (
    Response,
    Timing,
    cache_key,
    failure,
    to_job,
    to_request_result,
    to_response,
)
from flexgen_helm.types import Job, Result, RunStats

if TYPE_CHECKING:
    from flexgen_helm.runtime.engine import Engine


@dataclass(frozen=True)
class WorkloadReport:
    """What serving a workload took."""

    deployment: str
    num_requests: int
    num_cached: int
    stats: RunStats
    """Of the requests that were not cached."""

    def summary(self) -> str:
        """Return the line that a runner prints at the end."""
        # It comes with torch, which is loaded anyway when there is something to report.
        from flexgen_helm.runtime.progress import summary

        counts = f"{self.deployment}: {self.num_requests:,} requests, {self.num_cached:,} of them cached"
        return f"{counts}; {summary(self.stats)}" if self.stats.num_jobs else counts

    def as_dict(self) -> dict[str, Any]:
        """Return the report in plain types, for JSON."""
        return asdict(self)


def serve(
    deployment: ModelDeployment, requests: Sequence[Request], cache: ResponseCache, registry: EngineRegistry
) -> tuple[list[RequestResult], WorkloadReport]:
    """Serve requests of one deployment.

    A request that cannot be served gets a failure as its result and does not disturb the others. Whatever was computed
    is in the cache afterwards, also when the engine fails or the user interrupts it.

    Returns:
        Results in the order of the requests, and what it took.

    Raises:
        FlexGenError: No engine can be made of the deployment.
    """
    with registry.lease(parse_arguments(deployment.client_spec.args)) as engine:
        workload = _Workload(engine, cache, requests)
        workload.run()
        report = WorkloadReport(deployment.name, len(requests), workload.num_cached, workload.stats)
    hlog(report.summary())
    return workload.results(), report


class _Workload:
    """State of ``serve``."""

    def __init__(self, engine: Engine, cache: ResponseCache, requests: Sequence[Request]) -> None:
        self._engine = engine
        self._cache = cache
        self._requests = requests
        self._results: dict[int, RequestResult] = {}
        self.num_cached = 0
        self.stats = RunStats()

    def results(self) -> list[RequestResult]:
        return [self._results[index] for index in range(len(self._requests))]

    def run(self) -> None:
        """Answer every request from the cache or by the engine."""
        jobs = self._convert()
        keys = {index: cache_key(self._requests[index], job, self._engine.numerics) for index, job in jobs.items()}
        for index, stored in zip(keys, self._cache.lookup(keys.values()), strict=True):
            if stored is not None:
                self._results[index] = to_request_result(stored, cached=True)
        missing = [index for index in jobs if index not in self._results]
        self.num_cached = len(jobs) - len(missing)
        if missing:
            self._compute(missing, jobs, keys)

    def _convert(self) -> dict[int, Job]:
        jobs = {}
        for index, request in enumerate(self._requests):
            try:
                jobs[index] = to_job(request)
            except InvalidJob as error:
                self._results[index] = failure(error)
        return jobs

    def _compute(self, missing: list[int], jobs: dict[int, Job], keys: dict[int, Key]) -> None:
        finished: dict[int, Result] = {}
        started = time.time()
        try:
            results = self._engine.run(
                [jobs[index] for index in missing],
                on_result=lambda position, result: finished.update({missing[position]: result}),
                on_error="return",
            )
            finished.update(zip(missing, results, strict=True))
            self.stats = self._engine.stats
        finally:
            timing = Timing(started, time.time() - started, len(missing))
            self._cache.write((keys[index], response) for index, response in self._respond(finished, timing).items())

    def _respond(self, finished: dict[int, Result], timing: Timing) -> dict[int, Response]:
        responses = {}
        for index, result in finished.items():
            try:
                responses[index] = to_response(self._requests[index], result, timing)
            except FlexGenError as error:
                self._results[index] = failure(error)
            else:
                self._results[index] = to_request_result(responses[index], cached=False)
        return responses

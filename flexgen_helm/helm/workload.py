"""The requests of many runs, served by one engine in one go."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from helm.benchmark.model_deployment_registry import ModelDeployment
from helm.common.hierarchical_logger import hlog, hwarn
from helm.common.key_value_store import request_to_key
from helm.common.request import Request, RequestResult

from flexgen_helm.errors import DiskFull, FlexGenError, InvalidJob, JobFailed
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.deployment import EngineArguments, parse_arguments
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.known import recall
from flexgen_helm.helm.registry import EngineRegistry, messages_in_helms_log
from flexgen_helm.helm.requests import (
    Response,
    Timing,
    cache_key,
    failure,
    to_job,
    to_request_result,
    to_response,
)
from flexgen_helm.helm.response_cache import ResponseCache
from flexgen_helm.helm.run_record import Source, WorkloadReport
from flexgen_helm.run_stats import RunStats
from flexgen_helm.types import EngineInfo, Job, Numerics, Policy, Result

if TYPE_CHECKING:
    from flexgen_helm.runtime.engine import Engine


PLANNING = "flexgen_helm.runtime.planning"
"""Logger of what is planned before anything runs."""


@dataclass(frozen=True)
class Served:
    """Answers in the order of the requests."""

    results: list[RequestResult]
    sources: list[Source]
    report: WorkloadReport


class Server(Protocol):
    """Answers requests that neither cache nor journal knows."""

    def known(self, deployment: ModelDeployment, arguments: EngineArguments) -> EngineInfo | None:
        """Return what an engine that serves the deployment says of itself, if that is known before one is loaded."""

    def answer(self, deployment: ModelDeployment, workload: Workload, known: EngineInfo | None) -> EngineInfo:
        """Answer what is missing of a workload.

        Args:
            deployment: Whose requests they are.
            workload: What is asked; gets the answers.
            known: What an engine of the deployment said of itself; None: unknown, and answers were not looked up.

        Returns:
            What the engine that served says of itself.
        """


def serve(
    deployment: ModelDeployment,
    requests: Sequence[Request],
    cache: ResponseCache,
    journal: Journal,
    server: Server,
    console: Console,
) -> Served:
    """Serve requests of one deployment.

    A request that cannot be served gets a failure as its result and does not disturb the others. Every answer is in
    the journal at the sweep in which it finishes, and in the cache afterwards, also when the engine fails or the user
    interrupts it. No engine is loaded where every answer is known and an earlier one of the same numerics described itself.

    Raises:
        FlexGenError: No engine can be made of the deployment.
        DiskFull: Journal or cache cannot be written.
    """
    workload = Workload(cache, journal, requests)
    console.say(f"{deployment.name}: {workload.describe()}")
    info = server.known(deployment, arguments_of(deployment, journal))
    if info is not None:
        workload.look_up(info.numerics)
    if info is None or workload.missing:
        info = server.answer(deployment, workload, info)
    sources = workload.sources
    counts = (len(requests), sources.count("cached"), sources.count("resumed"))
    report = WorkloadReport(deployment.name, *counts, workload.stats, info)
    hlog(report.summary())
    return Served(workload.results, sources, report)


@dataclass(frozen=True)
class EngineServer:
    """The engine of this process."""

    registry: EngineRegistry
    journal: Journal
    console: Console
    accept: Callable[[Numerics], None] = lambda numerics: None
    """Raises an error for an engine that must not answer."""

    def known(self, deployment: ModelDeployment, arguments: EngineArguments) -> EngineInfo | None:
        """Return what an engine of these arguments said of itself on this machine."""
        return recall(arguments)

    def answer(self, deployment: ModelDeployment, workload: Workload, known: EngineInfo | None) -> EngineInfo:
        """Answer by the engine of the deployment, which is loaded if it is not there."""
        arguments, say = arguments_of(deployment, self.journal), self.console.say
        if begun := self.journal.policy(deployment.name):
            hlog(f"{deployment.name} continues with the numerics of the journal: {begun}")
        say(f"Loading {'@'.join(filter(None, (arguments['name_or_path'], arguments.get('compression'))))}")
        with self.console.showing(PLANNING), self.registry.lease(arguments, workload=workload.open_jobs) as engine:
            self.accept(engine.numerics)
            if known is None or known.numerics != engine.numerics:
                workload.look_up(engine.numerics)
            info = engine.describe()
            self.journal.note_policy(deployment.name, info.numerics.policy_fields)
            say(f"{len(workload.missing):,} of {len(workload.requests):,} requests are computed")
            workload.compute(engine, self.console)
            workload.stats = _with_limit(engine, workload.stats)
        return info


def arguments_of(deployment: ModelDeployment, journal: Journal) -> EngineArguments:
    """Return the deployment's arguments; what is resumed has the row sizes and the place of attention with which it began."""
    arguments, begun = parse_arguments(deployment.client_spec.args), journal.policy(deployment.name)
    policy = arguments.get("policy") or Policy(auto=True)
    left_open = {name: value for name, value in begun.items() if getattr(policy, name) is None}
    if left_open:
        arguments["policy"] = replace(policy, **left_open)
    return arguments


def _with_limit(engine: Engine, stats: RunStats) -> RunStats:
    try:
        return engine.with_limit(stats)
    except Exception as error:  # a figure is not worth the answers
        hwarn(f"The roofline efficiency of the run could not be measured: {error}")
        return replace(stats, limit_unknown=f"the machine's rates could not be measured: {error}")


class Workload:
    """State of ``serve``: which requests are answered, and how."""

    def __init__(self, cache: ResponseCache, journal: Journal, requests: Sequence[Request]) -> None:
        """Args: cache, journal: Where answers are found and kept. requests: In the order of the results."""
        self._cache, self._journal, self.requests = cache, journal, requests
        self._results: dict[int, RequestResult] = {}
        self._sources: dict[int, Source] = {}
        self._keys: dict[int, str] = {}
        self._jobs = self._convert()
        self.stats = RunStats()
        """Of what was computed."""

    @property
    def results(self) -> list[RequestResult]:
        """Answers and failures in the order of the requests."""
        return [self._results[index] for index in range(len(self.requests))]

    @property
    def sources(self) -> list[Source]:
        """Origin of each."""
        return [self._sources[index] for index in range(len(self.requests))]

    @property
    def missing(self) -> list[int]:
        """Requests whose answers are not known."""
        return [index for index in self._jobs if index not in self._results]

    @property
    def open_jobs(self) -> list[Job]:
        """Jobs of the requests whose answers are not known."""
        return [self._jobs[index] for index in self.missing]

    def describe(self) -> str:
        """Say how much is asked."""
        lengths = [job.max_new_tokens for job in self._jobs.values() if job.max_new_tokens]
        asked = [f"{len(self._jobs) - len(lengths):,} of scores"] if len(lengths) < len(self._jobs) else []
        asked += [f"{len(lengths):,} of at most {max(lengths):,} new tokens"] if lengths else []
        return f"{len(self.requests):,} requests ({', '.join(asked)})"

    def look_up(self, numerics: Numerics, *, computed: Container[int] = ()) -> None:
        """Take answers of these numerics from the cache and from the journal.

        Args:
            numerics: Of the engine.
            computed: Requests whose answers in the journal are of this command, not of an earlier one.
        """
        self._results = {index: result for index, result in self._results.items() if index not in self._jobs}
        requests = self.requests
        self._keys = {index: request_to_key(cache_key(requests[index], job, numerics)) for index, job in self._jobs.items()}
        for index, stored in zip(self._jobs, self._cache.lookup([self._keys[index] for index in self._jobs]), strict=True):
            if stored is not None:
                self._settle(index, "cached", stored)
        resumed: dict[int, Response] = {}
        for index in self.missing:
            found = self._journal.lookup(self._keys[index])
            if found is not None:
                resumed[index] = found
                self._settle(index, "computed" if index in computed else "resumed", found)
        self._store(resumed)

    def _convert(self) -> dict[int, Job]:
        jobs = {}
        for index, request in enumerate(self.requests):
            try:
                jobs[index] = to_job(request)
            except InvalidJob as error:
                self.fail(index, failure(error))
        return jobs

    def compute(self, engine: Engine, console: Console) -> None:
        """Answer by the engine what is missing."""
        missing, jobs = self.missing, self._jobs
        if not missing:
            return
        computed: dict[int, Response] = {}
        failed: dict[int, FlexGenError] = {}
        started, begun = time.time(), time.monotonic()  # the clock may be set meanwhile

        def timing() -> Timing:
            return Timing(started, time.monotonic() - begun, len(missing))

        def on_result(position: int, result: Result) -> None:
            index = missing[position]
            if result.error is not None:
                return
            try:
                computed[index] = to_response(self.requests[index], result, timing())
            except Exception as error:  # of this request alone
                failed[index] = error if isinstance(error, FlexGenError) else JobFailed(f"{type(error).__name__}: {error}")
                return
            self._journal.append(self._keys[index], computed[index])

        try:
            with messages_in_helms_log("flexgen_helm.runtime.progress"), messages_in_helms_log(PLANNING):
                asked = [jobs[index] for index in missing]
                results = engine.run(asked, on_result=on_result, on_error="return", progress=console.stream)
            self.stats = engine.stats
        finally:
            whole = timing()  # how long the batch took is known only now
            computed = {index: _stamped(response, whole) for index, response in computed.items()}
            self._store(computed)
        for index, result in zip(missing, results, strict=True):
            error = failed.get(index, result.error)
            if error is not None:
                self.fail(index, failure(error))
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

    def fail(self, index: int, result: RequestResult) -> None:
        """Settle a request by a failure."""
        self._sources[index] = "failed"
        self._results[index] = result


def _stamped(response: Response, timing: Timing) -> Response:
    """Return an answer with other times."""
    return {
        **response,
        "request_time": timing.seconds / timing.batch_size,
        "batch_request_time": timing.seconds,
    }

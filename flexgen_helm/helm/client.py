"""HELM client: requests of concurrent threads are computed together by one engine."""

from __future__ import annotations

import os
import time
from typing import Any

from helm.clients.client import CachingClient
from helm.common.cache import CacheConfig
from helm.common.hierarchical_logger import hexception, hlog
from helm.common.key_value_store import request_to_key
from helm.common.request import Request, RequestResult

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.deployment import RUNNER, parse_arguments
from flexgen_helm.helm.registry import ENGINES
from flexgen_helm.helm.requests import (
    Response,
    Timing,
    cache_key,
    failure,
    to_job,
    to_request_result,
    to_response,
)
from flexgen_helm.helm.written import check_deployment


class FlexGenClient(CachingClient):
    """Client of a flexgen deployment; ``client_spec.args`` are the keywords of ``Engine.from_pretrained``, verbatim."""

    def __init__(self, cache_config: CacheConfig, lock_file_path: str | None = None, **engine_arguments: Any) -> None:
        """Make the client of a deployment.

        Args:
            cache_config: Injected by HELM.
            lock_file_path: Injected by HELM. It lies in ``cache`` below ``--local-path``, which HELM says nowhere else.
            engine_arguments: Keywords of ``Engine.from_pretrained``.

        Raises:
            DeploymentError: The arguments do not describe an engine.
        """
        super().__init__(cache_config)
        self._arguments = parse_arguments(engine_arguments)
        self._cache_config = cache_config
        self._local_path = None if lock_file_path is None else os.path.dirname(os.path.dirname(lock_file_path))

    def make_request(self, request: Request) -> RequestResult:
        """Serve one request; safe to call from many threads, whose requests share sweeps.

        Returns:
            The answer, or a failure that HELM does not repeat.
        """
        try:
            response, cached = self._respond(request)
        except FlexGenError as error:
            return failure(error)
        except Exception as error:
            hexception(error)
            return failure(error)
        return to_request_result(response, cached=cached)

    def _respond(self, request: Request) -> tuple[Response, bool]:
        check_deployment(request.model_deployment, self._local_path)
        job = to_job(request)
        with ENGINES.lease(self._arguments, few_requests=True, on_load=_recommend_runner) as engine:
            key, cache = request_to_key(cache_key(request, job, engine.numerics)), ENGINES.caches.get(self._cache_config)
            (stored,) = cache.lookup([key])
            if stored is not None:
                return stored, True
            batch_size, started, begun = ENGINES.borrowers, time.time(), time.monotonic()
            result = engine.submit(job).result()
            response = to_response(request, result, Timing(started, time.monotonic() - begun, batch_size))
        cache.write([(key, response)])
        return response, False


def _recommend_runner() -> None:
    hlog(
        "flexgen computes together only the requests that helm-run sends at the same time (--num-threads). "
        f"`--runner-class-name {RUNNER}` is faster: it makes one workload of the requests of all run entries. Only it keeps a "
        "journal and writes flexgen.json and flexgen_workload.json."
    )

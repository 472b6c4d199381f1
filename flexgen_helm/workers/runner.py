"""HELM runner whose requests are answered by several workers: ``--runner-class-name flexgen_helm.workers.runner.RayRunner``."""

from __future__ import annotations

import os

from helm.benchmark.model_deployment_registry import ModelDeployment
from helm.benchmark.run_spec import RunSpec
from helm.common.cache import CacheConfig

from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.runner import FlexGenRunner
from flexgen_helm.helm.workload import Server
from flexgen_helm.workers.options import Workers
from flexgen_helm.workers.ray_pool import RayPool
from flexgen_helm.workers.serving import Pool, WorkersServer


class RayRunner(FlexGenRunner):
    """Runs a suite as its base class does, and writes the same files; workers answer what is not known yet.

    Environment variables say how many and where (`flexgen_helm.workers.options`). A worker that is lost is replaced, and
    its answers are kept. An error of a run entry or of the deployment is reported as with one worker.
    """

    def run_all(self, run_specs: list[RunSpec]) -> None:
        """Run all entries; see `FlexGenRunner.run_all`.

        Raises:
            FlexGenError: There are no workers, besides what the base class raises.
        """
        self.workers = Workers.named_by(os.environ)
        self.workers.check()
        self.pool = self.make_pool(self.workers)
        try:
            super().run_all(run_specs)
        finally:
            self.pool.close()

    def make_pool(self, workers: Workers) -> Pool:
        """Return the processes that answer."""
        return RayPool(workers)

    def server(self, journal: Journal) -> Server:
        """Return the workers."""
        return WorkersServer(self.workers, self.pool, journal, self._cache_of, self.console)

    def _cache_of(self, deployment: ModelDeployment) -> CacheConfig:
        config: CacheConfig = self.cache_backend.get_cache_config(deployment.host_organization)
        return config

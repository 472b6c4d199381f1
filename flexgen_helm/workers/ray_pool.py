"""Workers as tasks of Ray, which places them, notices that one is lost, and starts it again elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from helm.benchmark.model_deployment_registry import ModelDeployment

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.disk_errors import RESUME
from flexgen_helm.workers.options import Workers, no_cluster
from flexgen_helm.workers.share import Outcome, Refusal, Share
from flexgen_helm.workers.worker import answer_in_process

Task = Callable[[Share], Outcome | Refusal]
RETRIES = 3
"""Attempts after the first one, if the worker was lost and not if it met an error."""
LOOK_SECONDS = 0.5
STORE_BYTES = 100 * 2**20
"""Ray's memory for objects, in a cluster that is made for one command: requests alone pass through it."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it kills workers, which keep to limits of their own
    "RAY_DEDUP_LOGS": "0",
}
"""Ray's own variables in such a cluster, unless the user sets them."""


class RayPool:
    """A Ray cluster, which is reached or made when it is first needed."""

    def __init__(self, workers: Workers, *, task: Task = answer_in_process, retries: int = RETRIES) -> None:
        """Make the pool.

        Args:
            workers: How many, and where.
            task: Function that runs in a process of its own.
            retries: See `RETRIES`.
        """
        self._workers, self._task, self._retries = workers, task, retries
        self._ray: Any = None

    def gpus(self, deployment: ModelDeployment) -> float:
        """Return the GPUs of each worker.

        Raises:
            FlexGenError: No host of the cluster has so many.
        """
        nodes = [node["Resources"].get("GPU", 0) for node in self._connected().nodes() if node["Alive"]]
        asked = self._workers.gpus
        if asked is None:
            return float(max(nodes) > 0 and deployment.client_spec.args.get("device") != "cpu")
        if asked > max(nodes):
            raise FlexGenError(
                f"A worker is to have {asked:g} GPUs, but no host of the Ray cluster has more than {max(nodes):g}. Lower "
                "--gpus-per-worker, or leave it out."
            )
        return asked

    def run(self, shares: Sequence[Share], gpus: float, watch: Callable[[], None]) -> list[Outcome | Refusal]:
        """Answer shares in tasks of Ray; see `serving.Pool`."""
        ray = self._connected()
        # A process a share: GPU memory is free behind it, and threads and kernels are chosen before torch is imported.
        task = ray.remote(max_calls=1, num_cpus=1, num_gpus=gpus, max_retries=self._retries, scheduling_strategy="SPREAD")
        references = [task(self._task).remote(share) for share in shares]
        try:
            waiting = references
            while waiting:
                _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_SECONDS)
                watch()
            return [self._outcome(reference, share) for reference, share in zip(references, shares, strict=True)]
        except BaseException:
            for reference in references:
                ray.cancel(reference, force=True)
            raise

    def close(self) -> None:
        """End the cluster that was made for the command, or leave the one that was there."""
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None

    def _outcome(self, reference: Any, share: Share) -> Outcome | Refusal:
        errors = self._ray.exceptions
        try:
            outcome: Outcome | Refusal = self._ray.get(reference)
        except errors.RayTaskError:
            raise  # an error of ours, with where it was
        except errors.RayError as error:
            reason = " ".join(str(error).split())
            raise FlexGenError(
                f"Worker {share.number} was lost {self._retries + 1} times, at last by {type(error).__name__}: {reason} Where "
                f"memory is short, give fewer workers or a lower --max-memory. {RESUME}"
            ) from error
        return outcome

    def _connected(self) -> Any:
        if self._ray is None:
            import ray

            try:
                _connect(ray, self._workers)
            except BaseException:
                ray.shutdown()  # of what has started
                raise
            self._ray = ray
        return self._ray


def _connect(ray: Any, workers: Workers) -> None:
    """Reach the user's cluster, or make one of this machine.

    Raises:
        FlexGenError: There is no cluster at the address, or none can be made.
    """
    if workers.address is None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
    try:
        if workers.address is None:
            ray.init(address="local", num_cpus=workers.count, object_store_memory=STORE_BYTES, include_dashboard=False)
        else:
            ray.init(address=workers.address)
    except Exception as error:  # Ray raises plain ones
        reason = " ".join(str(error).split())
        if workers.address is not None:
            raise no_cluster(workers.address, reason) from error
        raise FlexGenError(
            f"Ray did not start on this machine ({reason}). Where it is busy, run the same command again; see Ray's log in "
            "/tmp/ray/session_latest/logs."
        ) from error

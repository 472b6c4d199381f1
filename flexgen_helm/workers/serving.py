"""The command's side: divides what is missing, lets workers answer it, and reads their answers from their journals."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from helm.benchmark.model_deployment_registry import ModelDeployment
from helm.common.cache import CacheConfig, SqliteCacheConfig
from tqdm import tqdm

from flexgen_helm.errors import FlexGenError
from flexgen_helm.helm.console import Console
from flexgen_helm.helm.deployment import EngineArguments
from flexgen_helm.helm.disk_errors import RESUME
from flexgen_helm.helm.journal import Journal
from flexgen_helm.helm.known import recall
from flexgen_helm.helm.workload import Workload
from flexgen_helm.runtime.progress import LINE_SECONDS
from flexgen_helm.types import EngineInfo
from flexgen_helm.workers.division import divide
from flexgen_helm.workers.meeting import Meeting, meeting
from flexgen_helm.workers.options import Workers
from flexgen_helm.workers.share import FILES, KERNELS, Outcome, Place, Refusal, Share
from flexgen_helm.workers.totals import together


class Pool(Protocol):
    """Processes that answer shares, each of them one at a time."""

    def gpus(self, deployment: ModelDeployment) -> float:
        """Return the GPUs of each worker."""

    def run(self, shares: Sequence[Share], gpus: float, watch: Callable[[], None]) -> list[Outcome | Refusal]:
        """Answer shares and return what became of them, in their order.

        Args:
            shares: One for each worker.
            gpus: Of each worker.
            watch: Called again and again meanwhile.

        Raises:
            FlexGenError: A worker was lost too often, or there is none.
        """

    def close(self) -> None:
        """End the processes."""


@dataclass(frozen=True)
class WorkersServer:
    """Several workers in the place of the engine of this process."""

    workers: Workers
    pool: Pool
    journal: Journal
    cache: Callable[[ModelDeployment], CacheConfig]
    console: Console

    def known(self, deployment: ModelDeployment, arguments: EngineArguments) -> EngineInfo | None:
        """Return what an engine here said of itself, if those of the workers are on a device of the same kind."""
        joined = self.workers.address is not None  # else workers are on this machine
        elsewhere = joined and not torch.cuda.is_available() and self.pool.gpus(deployment) > 0
        return None if elsewhere else recall(arguments)

    def answer(self, deployment: ModelDeployment, workload: Workload, known: EngineInfo | None) -> EngineInfo:
        """Answer what is missing.

        Raises:
            FlexGenError: A worker met an error that belongs to the deployment, was lost too often, or its answers are not
                in the journal. Answers that others gave are kept.
        """
        missing = workload.missing
        places = [[missing[at] for at in piece] for piece in divide(workload.open_jobs, self.workers.count)]
        with meeting(self.journal.unfinished) as met:
            if known is not None:
                met.agree(known.numerics)
            begun = self.journal.policy(deployment.name) or (known.numerics.policy_fields if known is not None else {})
            place = self._place(met, deployment)
            shares = [
                Share(number, deployment, tuple(workload.requests[at] for at in indices), begun, place)
                for number, indices in enumerate(places, start=1)
            ]
            self.console.say(_described(places))
            with _Watch(self.journal, self.console, len(missing), len(shares)) as watch:
                outcomes = self.pool.run(shares, self.pool.gpus(deployment), watch.look)
        return self._gather(deployment, workload, places, outcomes)

    def _place(self, met: Meeting, deployment: ModelDeployment) -> Place:
        variables = {name: value for name, value in os.environ.items() if name.startswith(KERNELS) or name in FILES}
        cache = self.cache(deployment)
        if isinstance(cache, SqliteCacheConfig):
            cache = replace(cache, path=os.path.abspath(cache.path))
        folder = self.journal.unfinished.parent.absolute()
        return Place(os.getcwd(), variables, torch.get_num_threads(), folder, tuple(self.journal.runs), met, cache)

    def _gather(
        self,
        deployment: ModelDeployment,
        workload: Workload,
        places: Sequence[Sequence[int]],
        outcomes: Sequence[Outcome | Refusal],
    ) -> EngineInfo:
        """Take the answers from the journals."""
        refusals = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
        for refusal in refusals:
            self.console.say(f"The worker on {refusal.host} gave up: {type(refusal.error).__name__}: {refusal.error}")
        if refusals:
            raise refusals[0].error
        done = [(indices, outcome) for indices, outcome in zip(places, outcomes, strict=True) if isinstance(outcome, Outcome)]
        info = done[0][1].info
        computed = {
            at for indices, outcome in done for at, source in zip(indices, outcome.sources, strict=True) if source == "computed"
        }
        workload.look_up(info.numerics, computed=computed)
        for indices, outcome in done:
            for at, result in outcome.failures.items():
                workload.fail(indices[at], result)
        if workload.missing:
            raise FlexGenError(
                f"{len(workload.missing)} answers that workers gave are not in {self.journal.unfinished.parent}: records were "
                f"damaged or deleted meanwhile, or this host sees another folder than theirs. {RESUME}"
            )
        self.journal.note_policy(deployment.name, info.numerics.policy_fields)
        workload.stats = together([outcome.stats for _, outcome in done])
        return info


def _described(places: Sequence[Sequence[int]]) -> str:
    counts = ", ".join(f"{len(indices):,}" for indices in places)
    return f"{sum(map(len, places)):,} requests are divided among {len(places)} workers: {counts}"


@dataclass
class _Watch:
    """Shows how far workers are and which of them were lost, by what they write into their journals."""

    journal: Journal
    console: Console
    total: int
    num_workers: int
    _attempts: dict[int, int] = field(default_factory=dict)
    _done: int = 0
    _said: float = field(default_factory=time.monotonic)

    def __enter__(self) -> _Watch:
        self._bar = tqdm(total=self.total, desc="Answers", file=self.console.stream or sys.stderr, disable=None, leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        self.look()
        self._bar.close()

    def look(self) -> None:
        """Read what is new."""
        for record in self.journal.refresh():
            if "key" in record:
                self._done += 1
                self._bar.update()
            elif "helper" in record:
                self._greet(record["helper"])
        if self._bar.disable and self._done and time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            self.console.say(f"{self._done:,} of {self.total:,} requests are answered")

    def _greet(self, who: Mapping[str, object]) -> None:
        """Say who works, and that it does so for one that was lost."""
        number = int(str(who["worker"]))
        attempt = self._attempts[number] = self._attempts.get(number, 0) + 1
        name, process = f"Worker {number} of {self.num_workers}", f"process {who['process']} on {who['host']}"
        if attempt == 1:
            self.console.say(f"{name} is {process}")
        else:
            self.console.say(f"{name} was lost: {process} takes over what is not in the journal (attempt {attempt})")

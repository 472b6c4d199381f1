"""The engine: a model that answers batches of jobs. Usable without HELM."""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import FlexGenError, InvalidJob, OutOfSpace, PolicyError
from flexgen_helm.memory.machine import free_bytes, used_bytes
from flexgen_helm.runtime.digest import model_digest
from flexgen_helm.runtime.executor import SerialExecutor
from flexgen_helm.runtime.intake import Intake, Ticket
from flexgen_helm.runtime.jobs import PreparedJob, prepare
from flexgen_helm.runtime.kinds import Kind, KindChoice, check_model, log_choice, make_rows, validated_kind
from flexgen_helm.runtime.limit import layer_sizes, limit_seconds, measure_rates
from flexgen_helm.runtime.loading import LoadedModel, open_model
from flexgen_helm.runtime.progress import Progress
from flexgen_helm.runtime.sizes import default_block_tokens, default_policy, resolve_device, small_policy, validated
from flexgen_helm.runtime.vocabulary import Vocabulary
from flexgen_helm.runtime.worker import Snapshot, Worker
from flexgen_helm.schedule.operations import ORDERS, Order
from flexgen_helm.types import EngineInfo, Job, Policy, Result, RunStats

logger = logging.getLogger(__name__)

NUMERICS_VERSION = 1
"""Raised whenever answers may change by a bit for equal weights, dtype and row sizes."""
LARGE_BYTES = 2 * 2**30
"""Larger checkpoints are checked on their first layers before the rest is read: a refusal takes seconds."""
CACHE_SHARE = 0.6
"""Share of the free memory that K and V may take; the rest is for hidden states, logits and the caller."""


class Engine:
    """A loaded causal language model that answers jobs in large blocks.

    Answers do not depend on neighbours, order or block sizes; see `Policy` for what they depend on. All methods may be called
    from any thread.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        policy: Policy | None = None,
        order: Order = "zigzag",
        rows: KindChoice = "auto",
    ) -> None:
        """Check a loaded model and make an engine of it; most callers want `from_pretrained`.

        Args:
            loaded: The model; the engine takes it over.
            policy: Row and block sizes; None: chosen by the device.
            order: Order of a sweep's operations. It changes no bit.
            rows: See `from_pretrained`.

        Raises:
            UnsupportedModel: If the model would be computed wrongly.
            PolicyError: If a size of the policy is out of range.
        """
        self.policy = validated(policy) if policy is not None else default_policy(loaded.model.device)
        self.tokenizer: PreTrainedTokenizerBase | None = loaded.tokenizer
        self.max_length = loaded.max_length
        """Context in tokens: input and new tokens together."""
        self.stats = RunStats()
        """What the last `run` did."""
        self._loaded = loaded
        self._device = loaded.model.device
        self._checked = check_model(loaded, self.policy, rows)
        log_choice(loaded, self._checked)
        self.verdict = self._checked.verdict
        self.rows: Kind = self._checked.kind
        """Whether many sequences share a row or each has its own."""
        self.numerics: dict[str, str | int] = {
            "weights": model_digest(loaded.folder),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "rows": self.rows,
            "gpu_batch_size": self.policy.gpu_batch_size,
            "gpu_batch_tokens": self.policy.gpu_batch_tokens,
            "engine": NUMERICS_VERSION,
        }
        """What decides the bits of an answer beside the job itself: what belongs into a cache key."""
        self._worker = self._start(order)
        self._run_lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        policy: Policy | None = None,
        revision: str | None = None,
        order: Order = "zigzag",
        rows: KindChoice = "auto",
    ) -> Engine:
        """Load a model.

        Args:
            name_or_path: A model folder, or a name on the model hub.
            dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
            policy: Row and block sizes; None: chosen by the device.
            revision: Of a hub name.
            order: Order of a sweep's operations. It changes no bit.
            rows: "packed", "single" (one sequence a row, for models that packed rows cannot serve), or "auto": the
                first of them that computes the model rightly.

        Raises:
            UnsupportedModel: If the model would be computed wrongly.
            PolicyError: If a size of the policy is out of range.
            CorruptFile: If its files cannot be read.
        """
        if policy is not None:
            validated(policy)
        if order not in ORDERS:
            raise PolicyError(f"order is {order!r}. Give one of {', '.join(map(repr, ORDERS))}.")
        rows = validated_kind(rows)
        source = open_model(str(name_or_path), dtype=dtype, device=resolve_device(device), revision=revision)
        if source.num_bytes() > LARGE_BYTES:
            check_model(source.first_layers(), small_policy(source.device), rows)
        return cls(source.load(), policy=policy, order=order, rows=rows)

    def run(
        self,
        jobs: Sequence[Job],
        on_result: Callable[[int, Result], None] | None = None,
        on_error: Literal["raise", "return"] = "raise",
        progress: bool | None = None,
    ) -> list[Result]:
        """Answer jobs; all are validated before the first sweep.

        Args:
            jobs: Any number and mix.
            on_result: Called with (index, result) at the sweep in which a job finishes, from the calling thread.
            on_error: "raise": the first invalid job ends the call; "return": it gets `Result.error` and the others run.
            progress: Whether to show a bar; None: on a terminal only.

        Returns:
            One result for each job, in their order.

        Raises:
            InvalidJob: A job that cannot be served, with ``on_error="raise"``.
            OutOfSpace: A job whose K and V can never fit.
        """
        if on_error not in ("raise", "return"):
            raise FlexGenError(f"on_error is {on_error!r}. Give 'raise' or 'return'.")
        results: list[Result | None] = [None] * len(jobs)
        tickets: dict[int, Ticket] = {}
        for index, job in enumerate(jobs):
            try:
                tickets[index] = Ticket(self._prepare(job))
            except (InvalidJob, OutOfSpace) as error:
                if on_error == "raise":
                    raise type(error)(f"job {index}: {error}") from None
                results[index] = Result(error=error)
        with self._run_lock:
            self._run(tickets, results, on_result, on_error, progress)
        return [result for result in results if result is not None]

    def submit(self, job: Job) -> Future[Result]:
        """Answer one job in the background; it joins at the next sweep. Thread-safe.

        Raises:
            InvalidJob: At once, if the job cannot be served.
        """
        ticket = Ticket(self._prepare(job))
        self._worker.put([ticket])
        return ticket.future

    def describe(self) -> EngineInfo:
        """Return what the engine holds and by what its answers are decided."""
        modules = nn.ModuleList([self._loaded.model, *self._checked.model.layers])  # stand-ins are in the layers' place
        parameters = list(modules.parameters())
        num_bytes, count = sum(p.numel() * p.element_size() for p in parameters), sum(p.numel() for p in parameters)
        return EngineInfo(
            policy=self.policy,
            numerics=dict(self.numerics),
            bits_per_weight=8 * num_bytes / count,
            bits_per_cache_element=8.0 * self._loaded.model.dtype.itemsize,
            weight_bytes={"device": num_bytes, "host": 0, "disk": 0},
        )

    def share_of_limit(self, stats: RunStats) -> float | None:
        """Estimate how close a run came to the least time that this machine needs for its layers, from rates measured now.

        Returns:
            That time over the run's, or None where nothing was computed or the bound is unknown; see
            `flexgen_helm.runtime.limit`.
        """
        config = self._loaded.model.config.get_text_config(decoder=True)
        sizes = layer_sizes(self._checked.model.layers, getattr(config, "num_experts_per_tok", None))
        if sizes is None or not stats.sweeps:
            return None
        return limit_seconds(stats, sizes, measure_rates(self._device, self._loaded.model.dtype)) / stats.seconds

    def close(self) -> None:
        """Stop computing. What is in flight is cancelled; memory is freed with the engine itself."""
        self._worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self, order: Order) -> Worker:
        rows, self._scheduler = make_rows(
            self._checked,
            self.policy,
            capacity_bytes=int(CACHE_SHARE * free_bytes(self._device)),
            block_tokens=self.policy.block_tokens or default_block_tokens(self.policy, self._loaded.model),
            keep_all=order != "zigzag",
        )
        executor = SerialExecutor(rows, head_slice=self.policy.gpu_batch_size, order=order)
        vocabulary = None if self.tokenizer is None else Vocabulary(self.tokenizer)
        return Worker(self._scheduler, executor, Intake(vocabulary, self._loaded.end_token_ids))

    def _prepare(self, job: Job) -> PreparedJob:
        if not isinstance(job, Job):
            raise InvalidJob(f"A job is of type {type(job).__name__}. Give flexgen_helm.Job(prompt=...) or Job(token_ids=...).")
        try:
            prepared = prepare(job, tokenizer=self.tokenizer, max_length=self.max_length, vocab_size=self._loaded.vocab_size)
        except InvalidJob as error:
            if "context" in str(error):
                raise InvalidJob(f"{error} ({self.max_length} is {self._loaded.length_reason}.)") from None
            raise
        self._check_space(prepared)
        return prepared

    def _check_space(self, prepared: PreparedJob) -> None:
        job, capacity = prepared.job, self._scheduler.capacity_bytes
        completions = min(1, job.max_new_tokens) if prepared.is_greedy else job.num_completions
        needed = self._scheduler.bytes_needed(len(prepared.input_ids), [job.max_new_tokens] * completions)
        if needed > capacity:
            raise OutOfSpace(
                f"What the job keeps between sweeps (K and V) needs {needed / 2**30:.2f} GiB, but there are "
                f"{capacity / 2**30:.2f} GiB for all jobs. Shorten the prompt, ask for fewer or shorter completions, or free "
                "memory."
            )

    def _run(
        self,
        tickets: dict[int, Ticket],
        results: list[Result | None],
        on_result: Callable[[int, Result], None] | None,
        on_error: Literal["raise", "return"],
        shown: bool | None,
    ) -> None:
        before, watch = self._worker.snapshot, _Watch(self._device, len(tickets), self._worker.snapshot, shown)
        finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._worker.watch = watch
        for index, ticket in tickets.items():
            ticket.future.add_done_callback(functools.partial(_put, finished, index))
        try:
            self._worker.put(list(tickets.values()))
            for _ in tickets:
                index = finished.get()
                result = results[index] = _result(tickets[index], on_error)
                watch.progress.request_done(result)
                if on_result is not None:
                    on_result(index, result)
            self.stats = _stats(tickets, results, before, self._worker.snapshot)
            self.stats.seconds, self.stats.peak_bytes = watch.seconds(), watch.peak_bytes
            logger.info("%s", watch.progress.finish(self.stats))
        except BaseException:
            self._worker.cancel()
            raise
        finally:
            self._worker.watch = None
            watch.progress.close()


class _Watch:
    """Sees every operation of a run: draws the bar and notes the highest memory in use."""

    def __init__(self, device: torch.device, num_jobs: int, since: Snapshot, shown: bool | None) -> None:
        self._device, self._begin = device, time.perf_counter()
        self.peak_bytes = used_bytes(device)
        self.progress = Progress(num_jobs, since=since, shown=shown)

    def __call__(self, snapshot: Snapshot) -> None:
        self.peak_bytes = max(self.peak_bytes, used_bytes(self._device))
        self.progress.update(snapshot)

    def seconds(self) -> float:
        return time.perf_counter() - self._begin


def _result(ticket: Ticket, on_error: Literal["raise", "return"]) -> Result:
    try:
        return ticket.future.result()
    except (InvalidJob, OutOfSpace) as error:  # of this job alone
        if on_error == "raise":
            raise
        return Result(error=error)


def _put(finished: queue.SimpleQueue[int], index: int, _: object) -> None:
    finished.put(index)


def _stats(tickets: dict[int, Ticket], results: list[Result | None], before: Snapshot, after: Snapshot) -> RunStats:
    return RunStats(
        num_jobs=len(results),
        prompt_tokens_asked=sum(len(ticket.prepared.input_ids) for ticket in tickets.values()),
        prompt_tokens_computed=after.prompt_tokens - before.prompt_tokens,
        generated_tokens=after.generated_tokens - before.generated_tokens,
        sweeps=after.sweeps - before.sweeps,
    )

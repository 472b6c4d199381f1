"""The engine: a model that answers batches of jobs. Usable without HELM."""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from flexgen_helm.errors import DiskFull, FlexGenError, InvalidJob, JobFailed, OutOfSpace, PolicyError
from flexgen_helm.execution.overlapped import OverlappedExecutor
from flexgen_helm.execution.serial import SerialExecutor
from flexgen_helm.generation.prepare import PreparedJob, prepare
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.loading.source import named_dtype, open_dummy, open_model
from flexgen_helm.loading.versions import warn_if_untested
from flexgen_helm.memory.amounts import MaxMemory, gib, parse_max_memory
from flexgen_helm.memory.device import Device, resolve_device
from flexgen_helm.memory.hidden_store import HiddenStore
from flexgen_helm.memory.meter import Meter
from flexgen_helm.policy.memory_plan import cache_capacities, exceeded, left_bytes
from flexgen_helm.policy.roofline import layer_sizes, measure_rates, note_limit
from flexgen_helm.policy.row_sizes import default_block_tokens, resolved
from flexgen_helm.policy.working_memory import setting
from flexgen_helm.rows.choice import CachePlaces, Kind, KindChoice, make_rows, validated_kind
from flexgen_helm.runtime.building import Parts, Placing, build, free_space, make_folder
from flexgen_helm.runtime.intake import Intake, Ticket
from flexgen_helm.runtime.progress import Progress
from flexgen_helm.runtime.worker import Snapshot, Worker
from flexgen_helm.schedule.dependencies import rows_at_once
from flexgen_helm.schedule.operations import ORDERS, Order
from flexgen_helm.types import EngineInfo, Job, Policy, Result, RunStats

logger = logging.getLogger(__name__)

NUMERICS_VERSION = 3
"""Raised whenever answers may change by a bit for equal weights, dtype and row sizes."""


class Engine:
    """A loaded causal language model that answers jobs in large blocks.

    Answers do not depend on neighbours, order or block sizes; see `Policy` for what they depend on. All methods may be called
    from any thread.
    """

    def __init__(self, parts: Parts, *, order: Order = "zigzag", kv_dtype: torch.dtype | None = None) -> None:
        """Make an engine of its parts, which it takes over; callers want `from_pretrained`."""
        loaded = parts.loaded
        self.policy = parts.policy
        """With the shares of weights that were realised."""
        self.tokenizer: PreTrainedTokenizerBase | None = loaded.tokenizer
        self.max_length = loaded.max_length
        """Context in tokens: input and new tokens together."""
        self.vocab_size = loaded.vocab_size
        self.stats = RunStats()
        """What the last `run` did."""
        self.meter = parts.meter
        """Measures the runs of this engine."""
        self.self_check = parts.checked.verdict
        """What the self-check at load found."""
        self.rows: Kind = parts.checked.kind
        """Whether many sequences share a row or each has its own."""
        self._parts, self._loaded, self._checked = parts, loaded, parts.checked
        self._device = parts.device
        self.numerics: dict[str, str | int] = {
            "weights": loaded.digest,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "rows": self.rows,
            "gpu_batch_size": self.policy.gpu_batch_size,
            "gpu_batch_tokens": self.policy.gpu_batch_tokens,
            "engine": NUMERICS_VERSION,
        }
        """What decides the bits of an answer beside the job itself: what belongs into a cache key."""
        self._kv_dtype = loaded.model.dtype if kv_dtype is None else kv_dtype
        if self._kv_dtype != loaded.model.dtype:
            self.numerics["kv_dtype"] = str(kv_dtype).removeprefix("torch.")
        try:
            self._worker = self._start(order)
        except BaseException:
            if parts.weights is not None:
                parts.weights.close()
            raise
        self._run_lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        dtype: str = "auto",
        device: str | Device = "auto",
        policy: Policy | None = None,
        max_memory: MaxMemory | None = None,
        offload_folder: str | Path | None = None,
        kv_dtype: str | None = None,
        revision: str | None = None,
        order: Order = "zigzag",
        rows: KindChoice = "auto",
        dummy_weights: bool = False,
    ) -> Engine:
        """Load a model.

        Args:
            name_or_path: A model folder, or a name on the model hub.
            dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; a `Device` gives a CPU a memory of its own.
            policy: Sizes and places. What it leaves open is chosen by device and memory.
            max_memory: Most bytes of "device", "host" and "disk", as numbers or texts such as "15GiB"; what is not named is
                what is free. On a CPU, device and host are one memory, of which their sum may be used.
            offload_folder: For weights, cache and hidden states on disk; None: under the cache folder.
            kv_dtype: In which K and V are kept and met: "float32", "bfloat16" or "float16"; None: in the model's.
            revision: Of a hub name.
            order: Order of a sweep's operations. It changes no bit.
            rows: "packed", "single" (one sequence a row, for models that packed rows cannot serve), or "auto": the
                first of them that computes the model rightly.
            dummy_weights: Whether weights are made up, for benchmarks; then a config is enough.

        Raises:
            UnsupportedModel: If the model would be computed wrongly.
            PolicyError: If a number of the policy is out of range, or its plan does not fit.
            CorruptFile: If files of the model or of the offload folder cannot be read.
            DiskFull: If the offload folder has no space for what the policy puts there.
        """
        placing = Placing(parse_max_memory(max_memory), Path(offload_folder) if offload_folder else None)
        if order not in ORDERS:
            raise PolicyError(f"order is {order!r}. Give one of {', '.join(map(repr, ORDERS))}.")
        rows = validated_kind(rows)
        kept_as = None if kv_dtype is None else named_dtype("kv_dtype", kv_dtype)
        where = resolve_device(device)
        warn_if_untested()
        if dummy_weights:
            source = open_dummy(str(name_or_path), dtype=dtype, device=where.torch_device)
        else:
            source = open_model(str(name_or_path), dtype=dtype, device=where.torch_device, revision=revision)
        parts = build(source, where, resolved(policy, where), rows, placing)
        return cls(parts, order=order, kv_dtype=kept_as)

    def run(
        self,
        jobs: Sequence[Job],
        on_result: Callable[[int, Result], None] | None = None,
        on_error: Literal["raise", "return"] = "raise",
        progress: bool | TextIO | None = None,
    ) -> list[Result]:
        """Answer jobs; all are validated before the first sweep.

        Args:
            jobs: Any number and mix.
            on_result: Called with (index, result) at the sweep in which a job finishes, from the calling thread.
            on_error: "raise": the first invalid job ends the call; "return": it gets `Result.error` and the others run.
            progress: Whether to show a bar on standard error, or the stream to show it on. Where that is no terminal, a line
                says every 30 seconds how far the run is; with None it is in the log.

        Returns:
            One result for each job, in their order.

        Raises:
            InvalidJob: A job that cannot be served, with ``on_error="raise"``; `NotFinite` if its numbers are not finite.
            JobFailed: A job that met an error in code, with ``on_error="raise"``.
            OutOfSpace: A job whose K and V can never fit.
        """
        if isinstance(jobs, Job):
            raise FlexGenError("run takes a list of jobs, but got one job. Write engine.run([job]).")
        if on_error not in ("raise", "return"):
            raise FlexGenError(f"on_error must be 'raise' or 'return', not {on_error!r}.")
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
            bits_per_cache_element=8.0 * self._kv_dtype.itemsize,
            planned_bytes={str(tier): count for tier, count in self._parts.plan.needed_bytes.items()},
            cache_bytes={str(tier): count for tier, count in self._capacities.items()},
            weight_bytes={str(tier): count for tier, count in self._parts.plan.weight_bytes.items()},
        )

    def roofline_efficiency(self, stats: RunStats) -> float | None:
        """Estimate how close a run came to the least time that this machine needs for its layers, from rates measured now.

        Returns:
            That time over the run's, or None where nothing was computed or the bound is unknown; see
            `flexgen_helm.policy.roofline`.
        """
        parts, model = self._parts, self._loaded.model
        sizes = layer_sizes(
            self._checked.model.layers,
            setting(model, "num_experts_per_tok"),
            model.get_output_embeddings(),
            **parts.plan.bytes_per_sweep,
            own_memory=self._device.own_memory,
        )
        if sizes is None or not stats.per_sweep:
            return None
        folder = parts.folder if parts.folder.exists() else None
        device = self._device.torch_device
        rates = measure_rates(device, model.dtype, sizes=sizes, policy=self.policy, stats=stats, folder=folder)
        note_limit(stats, sizes, rates)
        return stats.limit_seconds / stats.seconds if stats.limit_seconds is not None else None

    def close(self) -> None:
        """Stop computing. What is in flight is cancelled; memory is freed with the engine itself."""
        self._worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self, order: Order) -> Worker:
        parts, policy, device = self._parts, self.policy, self._device
        if policy.cache[2] or policy.hidden[2]:
            make_folder(parts.folder)
        left = left_bytes(parts.plan, parts.space, free_space(device.torch_device, parts.folder))
        self._capacities = cache_capacities(
            policy.cache,
            left,
            own_memory=device.own_memory,
            num_layers=parts.plan.num_layers,
            rows_at_once=rows_at_once(suspends=device.own_memory and policy.cpu_attention > 0),
        )
        places = CachePlaces(
            self._capacities,
            device=device,
            kv_dtype=self._kv_dtype,
            folder=parts.folder,
            meter=self.meter,
        )
        block_tokens = policy.block_tokens or default_block_tokens(policy, self._loaded.model, left["device"])
        rows, self._scheduler = make_rows(self._checked, policy, places, block_tokens=block_tokens, keep_all=order != "zigzag")
        hidden = None
        if policy.hidden != (1.0, 0.0, 0.0):
            hidden = HiddenStore(policy.hidden, device=device, folder=parts.folder, meter=self.meter)
        executor = (OverlappedExecutor if policy.overlap else SerialExecutor)(
            rows, head_slice=policy.gpu_batch_size, order=order, weights=parts.weights, hidden=hidden, meter=self.meter
        )
        vocabulary = None if self.tokenizer is None else Vocabulary(self.tokenizer)
        intake = Intake(vocabulary, self._loaded.end_token_ids, dtype=self._loaded.model.dtype, kv_dtype=self._kv_dtype)
        return Worker(self._scheduler, executor, intake, self.meter, device.torch_device)

    def _prepare(self, job: Job) -> PreparedJob:
        if not isinstance(job, Job):
            raise InvalidJob(f"A job is of type {type(job).__name__}. Give flexgen_helm.Job(prompt=...) or Job(token_ids=...).")
        prepared = prepare(
            job,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            vocab_size=self.vocab_size,
            length_reason=self._loaded.length_reason,
        )
        self._check_space(prepared)
        return prepared

    def _check_space(self, prepared: PreparedJob) -> None:
        job, capacity = prepared.job, self._scheduler.capacity_bytes
        completions = min(1, job.max_new_tokens) if prepared.is_greedy else job.num_completions
        needed = self._scheduler.bytes_needed(len(prepared.input_ids), [job.max_new_tokens] * completions)
        if needed > capacity:
            raise OutOfSpace(
                f"The K/V cache of the job needs {gib(needed, up=True)}, but there are {gib(capacity)} for all jobs. Shorten "
                "the prompt, ask for fewer or shorter completions, or allow more memory (max_memory)."
            )

    def _run(
        self,
        tickets: dict[int, Ticket],
        results: list[Result | None],
        on_result: Callable[[int, Result], None] | None,
        on_error: Literal["raise", "return"],
        shown: bool | TextIO | None,
    ) -> None:
        self.meter.begin_run()
        before, watch = self._worker.snapshot, _Watch(self.meter, len(tickets), self._worker.snapshot, shown)
        finished: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._worker.watch = watch
        for index, ticket in tickets.items():
            ticket.future.add_done_callback(functools.partial(_put, finished, index))
        try:
            self._worker.put(list(tickets.values()))
            for _ in tickets:
                index = finished.get()
                result = results[index] = _result(index, tickets[index], on_error)
                watch.progress.request_done(result)
                if on_result is not None:
                    on_result(index, result)
            self.stats = _stats(tickets, results, before, self._worker.snapshot)
            self.stats.seconds = watch.seconds()
            self.meter.end_run(self.stats)
            parts = self._parts
            over = exceeded(parts.limits, self.stats, parts.plan.needed_bytes, own_memory=self._device.own_memory)
            if over is not None:
                logger.warning("more memory was used than allowed: %s. Lower block_tokens or num_gpu_batches.", over)
            logger.info("%s", watch.progress.finish(self.stats))
        except BaseException:
            self._worker.cancel()
            self.meter.end_run(RunStats())
            raise
        finally:
            self._worker.watch = None
            watch.progress.close()


class _Watch:
    """Sees every operation of a run: draws the bar and notes the memory in use."""

    def __init__(self, meter: Meter, num_jobs: int, since: Snapshot, shown: bool | TextIO | None) -> None:
        self._meter, self._begin = meter, time.perf_counter()
        self.progress = Progress(num_jobs, since=since, shown=shown)

    def __call__(self, snapshot: Snapshot) -> None:
        self._meter.sample()
        self.progress.update(snapshot)

    def seconds(self) -> float:
        return time.perf_counter() - self._begin


def _result(index: int, ticket: Ticket, on_error: Literal["raise", "return"]) -> Result:
    try:
        return ticket.future.result()
    except (InvalidJob, OutOfSpace, JobFailed) as error:  # of this job alone
        if on_error == "return":
            return Result(error=error)
        if isinstance(error, DiskFull):
            raise
        raise type(error)(f"job {index}: {error}") from error


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

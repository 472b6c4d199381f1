"""The engine: a loaded model that answers batches of jobs. It needs no HELM."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flexgen_helm.compression.config import CompressionConfig
from flexgen_helm.distributed.group import StageGroup
from flexgen_helm.errors import FlexGenError, InvalidJob, OutOfSpace
from flexgen_helm.execution.interfaces import Executor
from flexgen_helm.generation.job_errors import overflow
from flexgen_helm.generation.prepare import PreparedJob, prepare
from flexgen_helm.generation.vocabulary import Vocabulary
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.memory.amounts import MaxMemory, gib
from flexgen_helm.memory.device import Device
from flexgen_helm.model.linear import plain_weights
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.rows.choice import Kind, KindChoice
from flexgen_helm.run_stats import RunStats
from flexgen_helm.runtime.building import Parts, build
from flexgen_helm.runtime.description import describe, limited
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.runtime.final_hidden import LayerProbe, final_hidden, probing
from flexgen_helm.runtime.fitting.own_text import writing_job, written
from flexgen_helm.runtime.intake import Intake, Ticket
from flexgen_helm.runtime.opening import EngineArguments
from flexgen_helm.runtime.pipeline.launch import driven_group
from flexgen_helm.runtime.pipeline.make import make_first
from flexgen_helm.runtime.pipeline.pipe import StagePipe
from flexgen_helm.runtime.planning.automatic import known_workload
from flexgen_helm.runtime.planning.forecast import forecast
from flexgen_helm.runtime.precise_products import PRECISE_PRODUCTS
from flexgen_helm.runtime.run import Run
from flexgen_helm.runtime.worker import Worker
from flexgen_helm.schedule.operations import Order
from flexgen_helm.schedule.work import Scheduler
from flexgen_helm.types import EngineInfo, Job, Policy, Result

logger = logging.getLogger(__name__)


class Engine:
    """A loaded causal language model that answers jobs in large blocks.

    Answers do not depend on other jobs, their order or block sizes. `Engine.numerics` names everything else that decides
    them. All methods may be called from any thread.
    """

    def __init__(self, parts: Parts, group: StageGroup | None = None) -> None:
        """Start to wait for jobs. Users call `from_pretrained` instead.

        Args:
            parts: Parts of the engine, which it owns from now on.
            group: Stages of the pipeline of which these parts are the first; None: they are all.
        """
        loaded = parts.loaded
        self.policy = parts.policy
        """Policy with the realised shares of weights."""
        self.tokenizer: PreTrainedTokenizerBase | None = loaded.tokenizer
        self.max_length = loaded.max_length
        """Context in tokens: input and new tokens together."""
        self.vocab_size = loaded.vocab_size
        self.stats = RunStats()
        """Measurements of the last `run`."""
        self.meter = parts.meter
        """Meter of this engine's runs."""
        self.self_check = parts.checked.passed.verdict
        """Result of the self-check at load."""
        self.rows: Kind = parts.checked.passed.kind
        """Kind of rows: "packed" (many sequences share a row) or "single" (one sequence in a row)."""
        self.numerics = parts.numerics
        """Everything besides the job that decides the bits of an answer; it belongs in a cache key."""
        self._parts = parts
        try:
            vocabulary = None if self.tokenizer is None else Vocabulary(self.tokenizer)
        except BaseException:
            parts.executor.close()
            parts.held.close()
            raise
        intake = Intake(vocabulary, loaded.end_token_ids, dtype=loaded.model.dtype, kv_dtype=parts.kv_dtype)
        self._pipe = None if group is None or parts.neighbours is None else StagePipe(group, parts.neighbours)
        self._worker = Worker(parts.schedulers, parts.executor, intake, parts.meter, parts.device, self._pipe)
        self._run_lock = threading.RLock()

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - options of users, by keyword
        cls,
        name_or_path: str,
        *,
        dtype: str = "auto",
        device: str | Device = "auto",
        policy: Policy | Literal["auto"] | None = None,
        workload: Sequence[Job] | Workload | None = None,
        profile: str | Path | MachineProfile | None = None,
        max_memory: MaxMemory | None = None,
        offload_folder: str | Path | None = None,
        kv_dtype: str | None = None,
        compression: str | CompressionConfig | None = None,
        revision: str | None = None,
        order: Order = "zigzag",
        rows: KindChoice = "auto",
        dummy_weights: bool = False,
        recheck: bool = False,
        free_shapes: bool = False,
        compile_layers: bool = False,
    ) -> Engine:
        """Load a model.

        Args:
            name_or_path: A model folder, or a name on the model hub; with `@w4` and the like a compressed variant of it.
            dtype: "auto" (the checkpoint's on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
            device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N"; a `Device` gives a CPU a memory of its own.
            policy: Sizes and placement. Fields that are None are chosen by device and memory. None or "auto":
                ``Policy(auto=True)``, which is searched for the workload where not everything fits on the device.
            workload: Jobs that the engine will run, as far as they are known. None: no policy is searched.
            profile: The machine with which the search predicts: a `MachineProfile`, the name of one that comes with the
                package, or a file. None: this machine, measured once and kept in the cache folder.
            max_memory: Most bytes of "device", "host" and "disk", as numbers or texts such as "15GiB"; a tier without an entry
                may use what is free. On a CPU, device and host are one memory, and their sum counts.
            offload_folder: Folder for weights, cache and hidden states on disk; None: a folder under the cache folder.
            kv_dtype: Dtype in which K and V are stored and attention reads them: "float32", "bfloat16" or "float16"; None:
                the model's.
            compression: What is compressed, as a name such as "w4" (`flexgen_helm.compression.config`); None: nothing, or what
                ``name_or_path`` says.
            revision: Branch, tag or commit of a model on the hub.
            order: Order of a sweep's operations, "zigzag" or "row". It changes no bit.
            rows: "packed", "single" (one sequence in a row, for models that packed rows cannot serve), or "auto": the
                first of them that passes the self-check.
            dummy_weights: Whether to use random weights, for benchmarks; then a config is enough.
            recheck: Whether to repeat the self-check. Otherwise what it found is kept in the cache folder, and it is repeated
                if the model, the row sizes, the code, the libraries, the processor, the threads or the device changed.
            free_shapes: Whether rows have no padding, for measuring what fixed sizes cost. Answers then depend on their
                neighbours by a bit, and must not be cached.
            compile_layers: Whether what lies between products and attention is compiled, which takes up to a minute once on a
                machine. Answers differ in the last digits from those without.

        Raises:
            UnsupportedModel: If the model would be computed wrongly.
            CompressionError: If there is no such variant.
            PolicyError: If a number of the policy is out of range, or its plan does not fit.
            CorruptFile: If files of the model or of the offload folder cannot be read.
            DiskFull: If the offload folder has no space for everything that the policy puts there.
        """
        arguments = EngineArguments(
            name_or_path=str(name_or_path),
            dtype=dtype,
            device=device,
            policy=policy,
            profile=profile,
            max_memory=max_memory,
            offload_folder=offload_folder,
            kv_dtype=kv_dtype,
            compression=compression,
            revision=revision,
            order=order,
            rows=rows,
            dummy_weights=dummy_weights,
            recheck=recheck,
            free_shapes=free_shapes,
            compile_layers=compile_layers,
        )
        group = driven_group()
        if group is not None:
            return cls(make_first(group, arguments, partial(cls._write_alone, arguments)), group)
        options = arguments.options()
        source = arguments.source(options)
        if options.asked.auto:
            options = replace(options, workload=known_workload(source, workload))
        return cls(build(source, options, partial(cls._write_text, source, options)))

    @classmethod
    def _write_alone(cls, arguments: EngineArguments, folder: Path) -> Tensor:
        """Let the uncompressed model write the text in this process alone."""
        options = replace(arguments, policy=None).options()
        return cls._write_text(arguments.source(options), options, folder)

    @classmethod
    def _write_text(cls, source: ModelSource, options: EngineOptions, folder: Path) -> Tensor:
        """Let the uncompressed model write the text to which its weights are fitted, in float32 as its statistics are."""
        plain = EngineOptions(options.device, limits=options.limits, folder=folder)
        source = replace(source, dtype=torch.float32)

        def refuse(_: Path) -> Tensor:
            raise AssertionError("uncompressed weights are not fitted")

        logger.info("%s: the model writes the text to which its weights are fitted, once", source.name)
        with cls(build(source, plain, refuse)) as engine:
            job = writing_job(engine._parts.loaded)
            return written(job, engine.run([job])[0])

    def run(
        self,
        jobs: Sequence[Job],
        on_result: Callable[[int, Result], None] | None = None,
        on_error: Literal["raise", "return"] = "raise",
        progress: bool | TextIO | None = None,
    ) -> list[Result]:
        """Answer jobs. All are validated before the first sweep.

        Args:
            jobs: Jobs of any number and mix.
            on_result: Function that the calling thread calls with (index, result) at the sweep in which a job finishes.
            on_error: "raise": the first invalid job ends the call; "return": it gets `Result.error` and the others run.
            progress: Whether to show a bar on standard error, or the stream to show it on. If that is no terminal, a line
                every 30 seconds shows the progress. None: a bar if standard error is a terminal, else lines in the log.

        Returns:
            One result for each job, in the order of the jobs.

        Raises:
            InvalidJob: If a job cannot be served and ``on_error`` is "raise"; `NotFinite` if its numbers are not finite.
            JobFailed: If code fails for one job and ``on_error`` is "raise".
            OutOfSpace: If the K and V of a job can never fit and ``on_error`` is "raise".
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
            run = Run(self._worker, self.meter, tickets, results, on_error)
            expected = forecast(self._parts, tickets.values())
            self.stats = run.answer(on_result, progress)
            self.stats.predicted = expected
        over = self._parts.plan.exceeded(self.stats)
        if over is not None:
            logger.warning("more memory was used than allowed: %s. Lower block_tokens or num_gpu_batches.", over)
        return [result for result in results if result is not None]

    def submit(self, job: Job) -> Future[Result]:
        """Answer one job in the background; it joins the next sweep. May be called from any thread.

        Raises:
            InvalidJob: If the job cannot be served; raised at once.
            OutOfSpace: If its K and V can never fit; raised at once.
        """
        ticket = Ticket(self._prepare(job))
        self._worker.put([ticket])
        return ticket.future

    def final_hidden(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Compute sequences up to the output head, which `head` applies. Jobs that arrive meanwhile wait.

        Args:
            sequences: Token ids of at least two tokens each, used unchanged.

        Returns:
            For each sequence of T tokens the last layer's hidden states ``[T - 1, ...]`` in the model's dtype, on the host: of
            all positions but the last, so that state i predicts token i + 1.

        Raises:
            InvalidJob: If a sequence cannot be computed; `NotFinite` if its K or V are not finite.
            OutOfSpace: If the K and V of a sequence can never fit.
        """
        checked: list[tuple[int, ...]] = []
        for index, tokens in enumerate(sequences):
            if len(tokens) < 2:
                raise InvalidJob(f"Sequence {index} has {len(tokens)} tokens, of which none is predicted. Give two or more.")
            checked.append(self._prepare(Job(token_ids=tokens, score_prompt=True)).input_ids)
        with self._alone() as (scheduler, executor):
            found = final_hidden(scheduler, executor, checked)
        finite = [hidden for hidden in found if hidden is not None]
        if len(finite) < len(found):
            raise overflow(self._parts.loaded.model.dtype, self._parts.kv_dtype)
        return finite

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Hold the output head ready for the body of a `with` statement. Jobs that arrive meanwhile wait, and so does `close`.

        Yields:
            Function from final hidden states ``[P, ...]`` to logits ``[P, vocab]`` in fp32, both on the host, to be called in
            this thread. Logits are those of a sweep, bit by bit.
        """
        device = self._parts.device.torch_device
        with self._alone() as (_, executor), executor.unit(executor.num_layers):
            yield lambda hidden: executor.logits(hidden.to(device)).cpu()

    def probe_layers(self, tokens: Sequence[int], probe: LayerProbe) -> None:
        """Compute a sequence up to the output head, and show its hidden states between layers. Jobs that arrive wait.

        Args:
            tokens: Token ids, two or more.
            probe: Called with (j, k, hidden ``[T, ...]`` on the host) before layer j is applied to row k, and behind the last
                layer with the number of layers. What it returns takes the place of these states; None: they stay.

        Raises:
            InvalidJob: If the sequence cannot be computed.
            OutOfSpace: If its K and V can never fit.
        """
        checked = self._prepare(Job(token_ids=tokens, score_prompt=True)).input_ids
        with self._alone() as (scheduler, executor):
            final_hidden(scheduler, executor, [checked], probing(probe))

    @contextmanager
    def layer_weights(self, j: int) -> Iterator[dict[str, Tensor]]:
        """Hold the weights of layer j ready for the body of a `with` statement: its parameters by name, as they multiply."""
        with self._alone() as (_, executor), executor.unit(j):
            yield dict(plain_weights(self._parts.checked.model.layers[j]))

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._parts.checked.model.layers)

    @contextmanager
    def _alone(self) -> Iterator[tuple[Scheduler, Executor]]:
        """Give scheduler and executor to the calling thread, in which everything is set for computing.

        Raises:
            FlexGenError: If other processes have some of the layers.
        """
        if self._pipe is not None:
            raise FlexGenError("Layers are divided into stages, and this needs all of them. Use one process, without torchrun.")
        with self._run_lock, self._worker.borrowed() as parts, self._parts.device.current(), PRECISE_PRODUCTS.hold():
            yield parts

    def describe(self) -> EngineInfo:
        """Return the engine's policy, numerics and bytes on each tier."""
        return describe(self._parts)

    def with_limit(self, stats: RunStats) -> RunStats:
        """Return a run's stats with the least time that this machine needs for them, from rates measured now.

        The stats of a run that computed nothing are returned unchanged; `limit_unknown` says why there is no limit
        (`flexgen_helm.policy.roofline`).
        """
        return limited(self._parts, stats)

    def close(self) -> None:
        """Stop computing. Jobs that are not answered are cancelled; memory is freed with the engine itself."""
        self._worker.close()
        if self._pipe is not None:
            self._pipe.close()
        self._parts.held.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _prepare(self, job: Job) -> PreparedJob:
        if not isinstance(job, Job):
            raise InvalidJob(f"A job is of type {type(job).__name__}. Give flexgen_helm.Job(prompt=...) or Job(token_ids=...).")
        prepared = prepare(
            job,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            vocab_size=self.vocab_size,
            length_reason=self._parts.loaded.length_reason,
        )
        self._check_space(prepared)
        return prepared

    def _check_space(self, prepared: PreparedJob) -> None:
        job, scheduler = prepared.job, self._parts.scheduler
        completions = min(1, job.max_new_tokens) if prepared.is_greedy else job.num_completions
        needed = scheduler.bytes_needed(len(prepared.input_ids), [job.max_new_tokens] * completions)
        if needed > scheduler.capacity_bytes:
            raise OutOfSpace(
                f"The K/V cache of the job needs {gib(needed, up=True)}, but there are "
                f"{gib(scheduler.capacity_bytes)} for all jobs. Shorten the prompt, "
                "ask for fewer or shorter completions, or allow more memory (max_memory)."
            )

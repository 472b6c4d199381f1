"""Benchmark of throughput as FlexGen's paper defines it: prompts of one length, answers of one length, both phases run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexgen_helm.errors import InvalidJob
from flexgen_helm.memory.amounts import gib
from flexgen_helm.policy.bound import bound_of
from flexgen_helm.run_stats import RunStats, SweepStats
from flexgen_helm.runtime.trace import traced
from flexgen_helm.types import LINKS, TIERS, EngineInfo, Job

if TYPE_CHECKING:
    from flexgen_helm.runtime.engine import Engine


FITTING_SECONDS = 40.0
"""Seconds for the last run of ``measure_fitting``; with earlier runs and loading, a command takes about a minute."""

WAITED_FOR = {
    "weights": "weights",
    "cache": "K and V",
    "hidden": "hidden states",
    "cpu_attention": "attention on the CPU",
    "host": "the host",
}
"""What the device waited for, by the cause in words."""


@dataclass(frozen=True)
class Workload:
    """Prompts and answers of a benchmark."""

    prompt_len: int
    """Tokens of every prompt; all first tokens differ, so that no prefix is shared."""
    gen_len: int
    """Tokens of every answer; end tokens do not end it."""
    num_prompts: int
    """Number of prompts."""
    score: bool = False
    """Whether prompts are only read, as for multiple choice; then an answer has one token."""

    def jobs(self, vocab_size: int, seed: int) -> list[Job]:
        """Make the jobs, with random prompts.

        Args:
            vocab_size: Tokens of the vocabulary.
            seed: Seed of the random prompts.

        Raises:
            InvalidJob: If there are more prompts than tokens in the vocabulary.
        """
        if self.num_prompts > vocab_size:
            raise InvalidJob(
                f"{self.num_prompts} prompts cannot all begin differently: the model has {vocab_size} tokens. Ask for fewer."
            )
        numbers = random.Random(seed)
        prompts = [
            [first, *numbers.choices(range(vocab_size), k=self.prompt_len - 1)]
            for first in numbers.sample(range(vocab_size), self.num_prompts)
        ]
        length = 1 if self.score else self.gen_len
        return [Job(token_ids=prompt, max_new_tokens=length, ignore_eos=True) for prompt in prompts]


@dataclass(frozen=True)
class Measurement:
    """Result of a benchmark. Rates are tokens per second, and None if there was no such phase."""

    model: str
    """Name of the model."""
    workload: Workload
    engine: EngineInfo
    stats: RunStats = field(repr=False)
    load_seconds: float
    """Seconds that it took to make the engine."""

    @property
    def prefill_seconds(self) -> float:
        """Seconds of the sweeps that read prompts. If prompts need several sweeps, earlier ones decode in the later sweeps."""
        return sum(sweep.seconds for sweep in self._prefill)

    @property
    def decode_seconds(self) -> float:
        """Seconds of the sweeps that only decode."""
        return sum(sweep.seconds for sweep in self._decode)

    @property
    def throughput(self) -> float:
        """Generated tokens per second of both phases."""
        return self.stats.generated_tokens / self.stats.seconds

    @property
    def prefill_rate(self) -> float | None:
        """Computed prompt tokens per second of the sweeps that read prompts."""
        return _rate(sum(sweep.prompt_tokens for sweep in self._prefill), self.prefill_seconds)

    @property
    def decode_rate(self) -> float | None:
        """Tokens generated per second of the sweeps that only decode."""
        return _rate(sum(sweep.generated_tokens for sweep in self._decode), self.decode_seconds)

    @property
    def share_of_products(self) -> float | None:
        """Share of the run's time that its matrix products take at the measured rate; None if rates are unknown."""
        least = self.stats.least_seconds.get("products")
        return None if least is None else least / self.stats.seconds

    @property
    def gb_per_second(self) -> dict[str, float]:
        """Rate of each link while it was busy, in 10**9 bytes per second."""
        moved, busy = self.stats.bytes_moved, self.stats.busy_seconds
        return {link: moved[link] / 1e9 / busy[link] for link in LINKS if moved.get(link) and busy.get(link)}

    @property
    def _prefill(self) -> list[SweepStats]:
        return [sweep for sweep in self.stats.per_sweep if sweep.prompt_tokens]

    @property
    def _decode(self) -> list[SweepStats]:
        return [sweep for sweep in self.stats.per_sweep if not sweep.prompt_tokens]

    def as_dict(self) -> dict[str, Any]:
        """Return all measured and derived values as plain data for JSON."""
        derived = ("throughput", "prefill_seconds", "decode_seconds", "prefill_rate", "decode_rate", "share_of_products")
        return {
            "model": self.model,
            "workload": asdict(self.workload),
            "load_seconds": self.load_seconds,
            **{name: getattr(self, name) for name in derived},
            "latency_seconds": self.stats.seconds,
            "roofline_efficiency": self.stats.roofline_efficiency,
            "gb_per_second": self.gb_per_second,
            "engine": asdict(self.engine),
            "stats": self.stats.as_dict(),
        }

    def lines(self) -> list[str]:
        """Return the report for people, in lines."""
        stats, work = self.stats, self.workload
        generated = stats.generated_tokens // max(work.num_prompts, 1)
        taken, read = stats.peak_bytes - stats.idle_bytes, stats.prompt_tokens_computed / stats.seconds
        return [
            f"{self.model}: {work.num_prompts} prompts of {work.prompt_len} tokens, {generated} generated for each",
            f"  throughput      {self.throughput:,.2f} generated token/s, {read:,.1f} prompt token/s",
            f"  latency         {stats.seconds:.2f} s, after {self.load_seconds:.1f} s of loading",
            *([] if (expected := stats.forecast_text()) is None else [f"  prediction      {expected}"]),
            f"  prefill         {_rate_text(self.prefill_rate)} in {self.prefill_seconds:.2f} s",
            f"  decode          {_rate_text(self.decode_rate)} in {self.decode_seconds:.2f} s",
            f"  limit           {_share_text(self.stats.roofline_efficiency)} of what this machine could do at best",
            f"  products        {_share_text(self.share_of_products)} of the rate of its matrix products",
            *self._bound_lines(),
            *self._wait_lines(),
            *self._link_lines(),
            *self._tier_lines(),
            *self._stage_lines(),
            f"  process         {gib(stats.peak_bytes)} at most, {gib(taken)} more than before the run",
        ]

    def _bound_lines(self) -> Iterator[str]:
        bound = bound_of(self.stats)
        if bound is not None:
            yield f"  most time into  {bound.what}"
            yield f"  what helps      {bound.advice}"

    def _wait_lines(self) -> Iterator[str]:
        waits = sorted(self.stats.device_wait_seconds.items(), key=lambda item: -item[1])
        if waits:
            causes = ", ".join(f"{WAITED_FOR[cause]} {seconds:.2f} s" for cause, seconds in waits)
            share = sum(seconds for _, seconds in waits) / self.stats.seconds
            yield f"  device waits    {share:.0%} of the time: {causes}"

    def _link_lines(self) -> Iterator[str]:
        for link, rate in self.gb_per_second.items():
            saved = self.stats.bytes_saved.get(link)
            of_sparsity = "" if saved is None else f", {gib(max(0, saved))} saved by sparsity"
            yield f"  {link.replace('_', ' '):<16}{rate:.2f} GB/s, {gib(self.stats.bytes_moved[link])} in all{of_sparsity}"
        for resource, count in self.stats.as_dict()["per_sweep"]["bound_by"].items():
            yield f"  bound by        {resource.replace('_', ' ')} in {count} of {self.stats.sweeps} sweeps"

    def _tier_lines(self) -> Iterator[str]:
        measured, planned = self.stats.tier_peak_bytes, self.engine.planned_bytes
        for tier in (tier for tier in TIERS if tier in measured or tier in planned):
            room = self.engine.cache_bytes.get(tier, 0)
            expected = f", {gib(planned[tier])} planned" if tier in planned else ""
            expected += f" and room for {gib(room)} of K and V" if room else ""
            yield f"  {tier:<16}{gib(measured.get(tier, 0))} at most{expected}"

    def _stage_lines(self) -> Iterator[str]:
        for stage in self.engine.stages:
            planned = ", ".join(
                f"{gib(count)} of weights and buffers on {tier}" for tier, count in stage.planned_bytes.items() if count
            )
            rows = f"{gib(stage.travel_bytes)} of rows on their way"
            yield f"  {stage.name}: layers {stage.first_layer} to {stage.last_layer}, {planned}, {rows}"


def measure(
    engine: Engine,
    workload: Workload,
    *,
    model: str,
    load_seconds: float = 0.0,
    warm_up: bool = False,
    trace: Path | None = None,
) -> Measurement:
    """Run a benchmark.

    Args:
        engine: Engine of the model.
        workload: Prompts and answers.
        model: Name of the model in the report.
        load_seconds: Seconds that it took to make the engine.
        warm_up: Whether to run other prompts of the same form before, with two new tokens each.
        trace: File for a timeline; None: no timeline.

    Raises:
        InvalidJob: If the lengths do not fit into the model's context.
    """
    if warm_up:
        others = workload.jobs(engine.vocab_size, seed=1)
        engine.run([replace(job, max_new_tokens=min(2, job.max_new_tokens)) for job in others])
    with traced(engine, trace):
        engine.run(workload.jobs(engine.vocab_size, seed=0))
    return Measurement(model, workload, engine.describe(), engine.with_limit(engine.stats), load_seconds)


def measure_fitting(engine: Engine, workload: Workload, *, say: Callable[[str], None], **options: Any) -> Measurement:
    """Run a benchmark of as many prompts, up to one block, as take about ``FITTING_SECONDS`` on this machine.

    Every run has the lengths of the workload. Its time decides the number of prompts of the next run: rows are padded and
    weights are streamed once for all, so time grows less than proportionally with prompts. The last run counts.

    Args:
        engine: Engine of the model.
        workload: Workload of the first run, with the fewest prompts.
        say: Function that gets a line about each choice.
        options: Other arguments of ``measure``.
    """
    most = min(engine.policy.block_size, engine.vocab_size)
    while True:
        measured = measure(engine, workload, **options)
        count, seconds = workload.num_prompts, measured.stats.seconds
        if count >= most or seconds >= FITTING_SECONDS / 2:
            say(f"{count:,} prompts: {seconds:.1f} s. --num-prompts N chooses another number.")
            return measured
        workload = replace(workload, num_prompts=min(most, max(count + 1, int(count * FITTING_SECONDS / seconds))))
        say(f"{count:,} prompts: {seconds:.1f} s, so the next run has {workload.num_prompts:,}.")
        options["warm_up"] = False  # the run before has warmed up


def _rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds else None


def _rate_text(rate: float | None) -> str:
    return "no tokens" if rate is None else f"{rate:,.1f} token/s"


def _share_text(share: float | None) -> str:
    return "unknown share" if share is None else f"{share:.0%}"

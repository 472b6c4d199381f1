"""Both sides under the same limit, and how their answers compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flexgen_helm.errors import OutOfSpace
from flexgen_helm.memory.amounts import gib
from flexgen_helm.runs.agreement import Agreement
from flexgen_helm.runs.larger_than_ram import accelerate_side
from flexgen_helm.runs.larger_than_ram.accelerate_side import Batch
from flexgen_helm.runs.memory_limit import engine_side
from flexgen_helm.runs.memory_limit.process import Limits, Measured, run_task

ATTEMPTS = 3
"""At a batch of Accelerate's: close to the limit the kernel kills it one time and not another."""

Prompts = list[list[int]]


@dataclass(frozen=True)
class Work:
    """Prompts that both sides answer."""

    title: str
    prompts: Prompts
    new_tokens: int


@dataclass(frozen=True)
class Theirs:
    """Accelerate's side."""

    batches: list[tuple[Measured, Batch]]
    """By size, up to the first whose throughput is lower than that of the one before."""
    out_of_memory_at: int | None
    """The size of the batch for which the kernel killed it."""

    @property
    def best(self) -> tuple[Measured, Batch]:
        """The batch of the highest throughput."""
        return max(self.batches, key=lambda one: one[1].rate)


@dataclass(frozen=True)
class Ours:
    """The engine's side."""

    measured: Measured
    answers: engine_side.Answers


def run_accelerate(  # noqa: PLR0913 - a setting of the contender each
    work: Work, model: Path, dtype: str, limits: Limits, scratch: Path, *, batch_sizes: Sequence[int], memory_bytes: int
) -> Theirs:
    """Let Accelerate answer batches of growing size.

    Raises:
        OutOfSpace: If not even the first one fits into the memory.
    """

    def attempt(size: int) -> tuple[Measured, Path]:
        task = accelerate_side.Task(
            folder=str(model),
            dtype=dtype,
            offload_folder=str(scratch / "accelerate"),
            memory_bytes=memory_bytes,
            prompts=work.prompts[:size],
            new_tokens=work.new_tokens,
            threads=limits.threads,
        )
        measured, path = run_task(accelerate_side.__name__, task, limits, scratch, "accelerate")
        return measured, path

    return growing_batches("Accelerate", attempt, [size for size in batch_sizes if size <= len(work.prompts)])


def growing_batches(name: str, attempt: Callable[[int], tuple[Measured, Path]], sizes: Sequence[int]) -> Theirs:
    """Let a peer answer batches of growing size until its throughput falls or memory ends.

    Args:
        name: Of the peer.
        attempt: Answers a batch of a size; returns what was measured, and a file with a `Batch`.
        sizes: Growing.

    Raises:
        OutOfSpace: If not even the first one fits into the memory.
    """
    batches: list[tuple[Measured, Batch]] = []
    for size in sizes:
        for _ in range(ATTEMPTS):
            measured, path = attempt(size)
            if not measured.ended.out_of_memory:
                break
        else:
            if batches:
                return Theirs(batches, size)
            raise OutOfSpace(f"{name} ran out of memory at its first batch. Raise --memory. Its log:\n{measured.log_end}")
        batches.append((measured, Batch(**json.loads(path.read_text(encoding="utf-8")))))
        if len(batches) > 1 and batches[-1][1].rate < batches[-2][1].rate:
            break
    return Theirs(batches, None)


def run_engine(work: Work, model: Path | str, arguments: dict[str, Any], limits: Limits, scratch: Path) -> Ours:
    """Let the engine answer all prompts.

    Raises:
        OutOfSpace: If the kernel killed it.
    """
    task = engine_side.Task(str(model), arguments, work.prompts, work.new_tokens, limits.threads)
    measured, path = run_task(engine_side.__name__, task, limits, scratch, "engine")
    if measured.ended.out_of_memory:
        raise OutOfSpace(
            f"The engine needed more than {gib(limits.memory_bytes or 0)} and was killed. Raise --memory. "
            f"Its log:\n{measured.log_end}"
        )
    return Ours(measured, engine_side.read_answers(path))


def as_dict(theirs: Theirs, ours: Ours, agreement: Agreement) -> dict[str, Any]:
    """Everything measured, in plain types, without the answers themselves."""
    return {
        "accelerate": {
            "batches": [
                {**asdict(replace(batch, tokens=[])), "batch": batch.size, **_disk(measured)}
                for measured, batch in theirs.batches
            ],
            "out_of_memory_at": theirs.out_of_memory_at,
            "best_batch": theirs.best[1].size,
            "prompts_per_second": theirs.best[1].rate,
        },
        "engine": {
            "prompts": len(ours.answers.tokens),
            "seconds": ours.answers.seconds,
            "prompts_per_second": ours.answers.rate,
            "load_s": ours.answers.load_s,
            "weight_bytes": ours.answers.weight_bytes,
            "stats": ours.answers.stats,
            "sweeps": [asdict(sweep) for sweep in ours.answers.sweeps],
            "disk_read_rate_decoding": ours.answers.disk_rate(decoding=True),
            "disk_read_rate": ours.answers.disk_rate(decoding=False),
            **_disk(ours.measured),
        },
        "agreement": asdict(agreement),
        "ratio": ours.answers.rate / theirs.best[1].rate,
    }


def _disk(measured: Measured) -> dict[str, float]:
    return {"direct_read_before": measured.disk_before, "direct_read_after": measured.disk_after}

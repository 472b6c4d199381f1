"""The engine's side, a process of its own.

``python -m flexgen_helm.runs.memory_limit.engine_side task.json result.json``
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexgen_helm import Engine, Job
from flexgen_helm.run_stats import SweepStats
from flexgen_helm.types import Policy


@dataclass(frozen=True)
class Task:
    """A model to load and prompts to answer."""

    model: str
    """First argument of ``Engine.from_pretrained``, whose keywords are ``arguments``."""
    arguments: dict[str, Any]
    """The policy is a dictionary, as in a deployment's YAML."""
    prompts: list[list[int]]
    new_tokens: int
    threads: int


@dataclass(frozen=True)
class Sweep:
    """The figures of a sweep that are reported."""

    seconds: float
    prompt_tokens: int
    decode_tokens: int
    disk_read_bytes: int
    bound_by: str | None
    busy_seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, sweep: SweepStats) -> Sweep:
        """Take the reported figures of a measured sweep."""
        read = sweep.bytes_moved.get("disk_read", 0)
        return cls(sweep.seconds, sweep.prompt_tokens, sweep.decode_tokens, read, sweep.bound_by, dict(sweep.busy_seconds))


@dataclass(frozen=True)
class Answers:
    """Tokens, times and statistics of the engine."""

    load_s: float
    """Loading, the self-check and, where slabs were missing, their writing."""
    seconds: float
    tokens: list[list[int]]
    """New tokens of each prompt."""
    gaps: list[list[float]]
    """For each of them, how much more probable it was than the second best, in nats."""
    weight_bytes: dict[str, int]
    """By tier."""
    stats: dict[str, Any]
    bits_per_weight: float
    """Of compressed matrices; if none are compressed, of all weights on disk, or of all weights."""
    processor_s: float
    """Seconds of all cores together while prompts were answered."""
    sweeps: list[Sweep] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Prompts answered per second."""
        return len(self.tokens) / self.seconds

    @property
    def disk_read_bytes(self) -> int:
        """Bytes read from disk during the run."""
        return sum(sweep.disk_read_bytes for sweep in self.sweeps)

    def disk_rate(self, *, decoding: bool) -> float:
        """Bytes per second read from disk in all sweeps, or in those that decode and compute no prompt; 0 without any."""
        chosen = [sweep for sweep in self.sweeps if not decoding or (sweep.decode_tokens and not sweep.prompt_tokens)]
        return sum(sweep.disk_read_bytes for sweep in chosen) / sum(sweep.seconds for sweep in chosen) if chosen else 0.0


def read_answers(path: Path) -> Answers:
    """Read what the process wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Answers(**{**found, "sweeps": [Sweep(**sweep) for sweep in found["sweeps"]]})


def answer(task: Task) -> Answers:
    """Load the model, and answer all prompts as one workload."""
    torch.set_num_threads(task.threads)
    arguments = {**task.arguments, "policy": Policy(**task.arguments["policy"])}
    jobs = [Job(token_ids=prompt, max_new_tokens=task.new_tokens, top_logprobs=2, ignore_eos=True) for prompt in task.prompts]
    if arguments["policy"].auto:
        arguments["workload"] = jobs
    begun = time.perf_counter()
    with Engine.from_pretrained(task.model, **arguments) as engine:
        load_s = time.perf_counter() - begun
        processor_begun = time.process_time()
        completions = [result.completions[0] for result in engine.run(jobs, progress=False)]
        processor_s, info = time.process_time() - processor_begun, engine.describe()
        return Answers(
            load_s=load_s,
            seconds=engine.stats.seconds,
            tokens=[completion.token_ids for completion in completions],
            gaps=[[best[0].logprob - best[1].logprob for best in one.top_logprobs] for one in completions],
            weight_bytes=info.weight_bytes,
            stats=engine.stats.as_dict(),
            bits_per_weight=info.bits_per_compressed_weight or info.bits_per_weight_on_disk or info.bits_per_weight,
            processor_s=processor_s,
            sweeps=[Sweep.of(sweep) for sweep in engine.stats.per_sweep],
        )


if __name__ == "__main__":
    answers = answer(Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text(json.dumps(asdict(answers)), encoding="utf-8")

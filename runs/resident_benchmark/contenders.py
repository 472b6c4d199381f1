"""The contenders, each measured in a process of its own with the same threads, and the reference for their answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flexgen_helm.runs.agreement import Prompts
from flexgen_helm.runs.cpu_benchmark.contenders import Peer
from flexgen_helm.runs.memory_limit.cgroup import run_free

NAMES = ("engine", "engine_compiled", "transformers", "generate_batch", "lm_eval", "vllm")
"""Contenders in the order of the table; the module of each is ``sides/<name>_side.py``."""
MEASURE = Path(__file__).with_name("sides") / "measure.py"
SHOWN_LINES = 3
"""Last lines of a failed contender's log that the result has."""


@dataclass(frozen=True)
class Task:
    """What a contender has to answer."""

    title: str
    folder: str
    """The model folder; it names no end token, so that everyone generates as many tokens as asked."""
    dtype: str
    texts: list[str]
    """The prompts' texts, for lm-eval, which takes no tokens."""
    prompts: Prompts
    new_tokens: int
    candidates: int
    """Candidates with log-probabilities wanted for each new token."""
    threads: int
    repeats: int

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with its answer, rounded up to a multiple of 256."""
        return -(-(max(map(len, self.prompts)) + self.new_tokens) // 256) * 256


@dataclass(frozen=True)
class Measured:
    """What was measured of a contender."""

    load_s: float
    tokens: Prompts
    """New tokens of each prompt."""
    wall_s: list[float]
    """Of each repetition, without loading."""
    processor_s: list[float]
    setting: str
    """The setting that was measured."""
    tried_s: dict[str, float]
    """Processor seconds of all settings for the first prompts, where there are several."""


def interpreters(named: Mapping[str, Path | None]) -> dict[str, str]:
    """Return the interpreter of each contender that can run here.

    Args:
        named: Interpreters that the user named, of contenders that this one may lack.
    """
    found = dict.fromkeys(NAMES, sys.executable)
    for name, path in named.items():
        if path is not None:
            found[name] = str(path)
        elif importlib.util.find_spec(name) is None:
            del found[name]
    return found


def run(name: str, interpreter: str, task: Task, scratch: Path) -> Measured | str:
    """Measure a contender.

    Returns:
        What was measured, or the end of its log if it failed.
    """
    given, result, log = (scratch / f"{name}.{kind}" for kind in ("task.json", "result.json", "log"))
    given.write_text(json.dumps({**asdict(task), "max_length": task.max_length}), encoding="utf-8")
    command = [interpreter, str(MEASURE), f"{name}_side", str(given), str(result)]
    ended = run_free(command, log, environment(task.threads))
    if ended.status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"status {ended.status}: " + " | ".join(line.strip() for line in lines[-SHOWN_LINES:])
    return Measured(**json.loads(result.read_text(encoding="utf-8")))


def environment(threads: int) -> dict[str, str]:
    """Return variables for every contender: equally many threads, no network, and all of vLLM in the measured process."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


@torch.inference_mode()
def gaps(folder: str, prompts: Prompts, tokens: Prompts) -> list[list[float]]:
    """Return the differences between the two best tokens where each of some answers was chosen, in nats, in float32."""
    model, found = Peer.load(folder).model, []
    for prompt, new in zip(prompts, tokens, strict=True):
        logits = model(input_ids=torch.tensor([prompt + new[:-1]]), use_cache=False, logits_to_keep=len(new)).logits[0]
        best = logits.topk(2).values
        found.append((best[:, 0] - best[:, 1]).tolist())
    return found

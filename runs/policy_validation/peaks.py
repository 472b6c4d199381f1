"""Peaks of memory of one policy, measured in a process that does nothing else.

A process keeps what a library of products once took to work in, and what was freed between other things. A run behind other
work takes that again and grows by less: up to a quarter of a small model's peak was missed so (runs/LOG.md). What every process
needs whatever it computes, such as compiled loops and the code of libraries, is loaded before by a job of a tiny model.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaConfig

from flexgen_helm import Engine
from flexgen_helm.errors import FlexGenError
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.memory.allocator import return_freed_memory
from flexgen_helm.policy.planner.simulate import running_bytes
from flexgen_helm.runtime.planning.automatic import known_workload
from flexgen_helm.types import Job, Tier

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Sizes of the model that lets a process load its code."""
MIB = 2**20


class Peaks(NamedTuple):
    """Most bytes of each tier while jobs run."""

    predicted: dict[Tier, int]
    measured: dict[Tier, int]


def peaks_alone(arguments: Sequence[str], name: str) -> Peaks:
    """Measure a policy in a process of its own.

    Args:
        arguments: Arguments of the command that say what is run.
        name: Name of the policy.

    Raises:
        FlexGenError: If the process fails; what it wrote is on standard error.
    """
    command = [sys.executable, "-m", __package__, *arguments, "--one-peak", name]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise FlexGenError(f"The peak of {name!r} could not be measured (status {found.returncode}). See the error above.")
    return Peaks(**json.loads(found.stdout.splitlines()[-1]))


def peaks_here(engine: Engine, source: ModelSource, jobs: list[Job]) -> Peaks:
    """Run jobs in this process, and return what they were predicted to take and took."""
    workload = known_workload(source, jobs)
    assert workload is not None
    plan = engine._parts.plan
    forget_peak()
    engine.run(jobs, progress=False)
    return Peaks(dict(running_bytes(plan, workload)), plan.held_bytes(engine.stats))


def load_code(folder: Path, dtype: str, open_engine: Callable[[str], Engine]) -> None:
    """Let a tiny model answer a job under the policy, so that libraries and the compiled loops of its formats are loaded.

    Args:
        folder: Where the model is made.
        dtype: Its dtype.
        open_engine: Opens the engine of a model's folder.
    """
    config = LlamaConfig(**TINY, bos_token_id=None, eos_token_id=None, dtype=dtype, architectures=["LlamaForCausalLM"])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    with open_engine(str(folder)) as engine:
        engine.run([Job(token_ids=list(range(1, 20)), score_prompt=True, max_new_tokens=3)], progress=False)


def forget_peak() -> None:
    """Return freed memory and make the kernel note this process's peak anew: the self-check may have held more than the run."""
    gc.collect()
    return_freed_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")

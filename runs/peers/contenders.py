"""The peers: which can run here, and what each is measured with. Each is a process of its own under the same limit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.larger_than_ram import accelerate_side
from flexgen_helm.runs.larger_than_ram.accelerate_side import Batch
from flexgen_helm.runs.larger_than_ram.contenders import Theirs, Work, growing_batches
from flexgen_helm.runs.memory_limit.cgroup import Ended
from flexgen_helm.runs.memory_limit.process import Limits, Measured, run_side

SIDES = Path(__file__).with_name("sides")
MODULES = {"accelerate": "accelerate", "deepspeed": "deepspeed", "flexllmgen": "flexgen"}
"""What each peer's interpreter must be able to import."""
_PROBE = """
import importlib.metadata, json
import {module}
import torch
print(json.dumps([importlib.metadata.version("{module}"), torch.cuda.is_available()]))
"""
_OUT_OF_GPU_MEMORY = "OutOfMemoryError"


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common."""

    model: Path
    dtype: str
    work: Work
    limits: Limits
    scratch: Path
    device_bytes: int | None
    """Limit of the GPU's memory; None: the CPU computes."""
    batches: tuple[int, ...]
    """Sequences that a peer answers at a time, growing."""
    flexllmgen_policy: tuple[int, ...]
    """Size and number of GPU batches, and percentages of weights, cache and activations on GPU and CPU."""
    most_seconds: int
    """A process of a peer that takes longer is ended."""

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        found: dict[str, Any] = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        return found


@dataclass(frozen=True)
class Task(accelerate_side.Task):
    """What DeepSpeed and FlexLLMGen must know besides."""

    offload: str = "cpu"
    """Where DeepSpeed keeps parameters: ``cpu`` or ``nvme``."""
    largest_parameter: int = 0
    """Elements of the largest one."""
    policy: tuple[int, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A peer that was not measured."""

    reason: str


def probe(name: str, interpreter: str, setting: Setting) -> str | Skipped:
    """Return the version of a peer, or why it cannot serve this model on this device."""
    module = MODULES[name]
    try:
        found = subprocess.run(
            [interpreter, "-c", _PROBE.format(module=module)], check=False, capture_output=True, text=True, timeout=600
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Skipped(f"its interpreter does not run: {error}")
    lines = found.stdout.splitlines()
    if found.returncode or not lines:
        return Skipped(f"{last_line(found.stderr)}; name an interpreter that has `{module}` with --{name}")
    version, has_gpu = json.loads(lines[-1])
    needs_gpu = name == "flexllmgen" or setting.device_bytes is not None
    if needs_gpu and not has_gpu:
        why = (
            ' only: OptLM makes torch.cuda.Stream, and its "cpu" policies move attention alone' if name == "flexllmgen" else ""
        )
        return Skipped(f"{version} computes on a GPU{why}; its interpreter sees none")
    if name == "flexllmgen" and setting.device_bytes is None:
        return Skipped(f"{version} computes on a GPU; name the limit of its memory with --device-memory")
    return _refused_by_flexllmgen(setting) or str(version) if name == "flexllmgen" else str(version)


def _refused_by_flexllmgen(setting: Setting) -> Skipped | None:
    kind, block = setting.config["model_type"], setting.flexllmgen_policy[0] * setting.flexllmgen_policy[1]
    if kind != "opt":
        return Skipped(f"it serves OPT alone, and this model is of type {kind}")
    if setting.dtype != "float16":
        return Skipped(f"it knows float16 alone, and all contenders compute in {setting.dtype}; give --dtype float16")
    if len(setting.work.prompts) % block:
        return Skipped(f"it answers whole blocks of {block} prompts, and there are {len(setting.work.prompts)}")
    return None


def last_line(text: str) -> str:
    """Return the last line that says something, which of a traceback is the error."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it ended without a message")


def run_peer(name: str, interpreter: str, setting: Setting) -> Theirs | Skipped:
    """Measure a peer at its best batch; FlexLLMGen answers all prompts with its policy."""
    sizes = [size for size in setting.batches if size <= len(setting.work.prompts)]
    if name == "flexllmgen":
        sizes = [len(setting.work.prompts)]
    try:
        return growing_batches(name, _attempt(name, interpreter, setting), sizes)
    except FlexGenError as error:
        return Skipped(last_line(str(error)))


def _attempt(name: str, interpreter: str, setting: Setting) -> Callable[[int], tuple[Measured, Path]]:
    file = Path(accelerate_side.__file__) if name == "accelerate" else SIDES / f"{name}_side.py"
    preparing = [interpreter, "-c", f"import torch, transformers, {MODULES[name]}"]
    if name == "deepspeed":
        preparing = [interpreter, str(file), "prepare", offload(setting)]
    limited = ["timeout", "-k", "10", str(setting.most_seconds)]

    def attempt(size: int) -> tuple[Measured, Path]:
        task = make_task(setting, size)
        given = task if name != "accelerate" else accelerate_side.Task(**_fields(task))
        stem = setting.scratch / name
        try:
            command = [*limited, interpreter, str(file)]
            measured, result = run_side(command, [*limited, *preparing], given, setting.limits, stem)
        except FlexGenError as error:
            if _OUT_OF_GPU_MEMORY in str(error):  # of a GPU's memory a process learns by an exception
                return Measured(Ended(1, 0.0, out_of_memory=True), 0.0, 0.0, str(error)), stem
            if "status 124" in str(error):
                raise FlexGenError(f"it did not end within {setting.most_seconds} s") from error
            raise
        return measured, result

    return attempt


def make_task(setting: Setting, size: int) -> Task:
    """Return the task of a peer for the first prompts."""
    return Task(
        folder=str(setting.model),
        dtype=setting.dtype,
        offload_folder=str(setting.scratch / "offload"),
        memory_bytes=(setting.limits.memory_bytes or 2**50) if setting.device_bytes is not None else 16 * 2**20,
        prompts=setting.work.prompts[:size],
        new_tokens=setting.work.new_tokens,
        threads=setting.limits.threads,
        device_bytes=setting.device_bytes,
        offload=offload(setting),
        largest_parameter=setting.config["hidden_size"] * max(setting.config["vocab_size"], 4 * setting.config["hidden_size"]),
        policy=setting.flexllmgen_policy,
    )


def _fields(task: Task) -> dict[str, Any]:
    return {name: value for name, value in asdict(task).items() if name in accelerate_side.Task.__dataclass_fields__}


def offload(setting: Setting) -> str:
    """Return where DeepSpeed keeps the parameters: in memory if they fill at most half of the limit, otherwise on disk."""
    size = sum(file.stat().st_size for file in setting.model.glob("*.safetensors"))
    limit = setting.limits.memory_bytes
    return "cpu" if limit is None or 2 * size <= limit else "nvme"


def token_rate(best: Batch, new_tokens: int) -> tuple[float, float]:
    """Return new tokens per second, and per second of a processor."""
    tokens = best.size * new_tokens
    return tokens / best.seconds, tokens / best.processor_s

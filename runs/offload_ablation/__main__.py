"""The worth of each part of the runtime under a memory limit, in the manner of table 4 of the FlexGen paper.

A model larger than the memory answers the same prompts with everything on, then with one thing changed at a time. Every
variant is a process of its own under the limit (a cgroup's, so root is needed: exit status 3 without), and answers must be the
same. Attention on the CPU is told apart only where the device has a memory of its own; elsewhere the host's cache is met where
it lies in any case. Cost on two cores of a server CPU: about 15 minutes, 9 GiB of disk.

Command: ``python -m flexgen_helm.runs.offload_ablation --model-size 4GiB --memory 2GiB --json result.json``
On a GPU: ``python -m flexgen_helm.runs.offload_ablation --device cuda --model facebook/opt-30b --dtype bfloat16
--device-memory 15GiB --prompts 512 --prompt-len 512 --new-tokens 32 --batch 64 --batch-tokens 4096``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flexgen_helm.memory.amounts import gib, parse_size
from flexgen_helm.runs.command_line import add_json, exit_on_sigterm, make_parser, reports_errors, write_json
from flexgen_helm.runs.larger_than_ram.contenders import Ours, Work, run_engine
from flexgen_helm.runs.memory_limit.model import Shape, random_model, random_prompts
from flexgen_helm.runs.memory_limit.process import Limits


@dataclass(frozen=True)
class Variant:
    """One row of the table, as its differences from everything on."""

    name: str
    policy: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    """More keywords of ``Engine.from_pretrained``."""


@dataclass(frozen=True)
class Line:
    """Measurements of a variant."""

    variant: Variant
    seconds: float
    tokens_per_second: float
    disk_read_bytes: int
    bound_by: dict[str, int]
    """Sweeps by the resource that was busy longest."""
    equal: bool
    """Whether all tokens are those of the first variant."""


def variants(options: argparse.Namespace) -> list[Variant]:
    """All rows of the table; all prompts that enter at once are done at once, so that none is left for the sweeps between."""
    found = [
        Variant("all on"),
        Variant("no overlap", {"overlap": False}),
        Variant("no CPU attention", {"cpu_attention": 0.0}),
        Variant("row order", arguments={"order": "row"}),
        Variant("prefetch depth 1", {"prefetch": 1}),
        Variant("no prompts in decode sweeps", {"block_tokens": options.prompts * options.prompt_len}),
    ]
    return [variant for variant in found if options.device == "cuda" or "cpu_attention" not in variant.policy]


def all_on(options: argparse.Namespace, offload_folder: Path) -> dict[str, Any]:
    """Keywords of ``Engine.from_pretrained`` with everything on: prompts enter a row at a time, beside those that decode."""
    policy = {
        "gpu_batch_size": options.batch,
        "gpu_batch_tokens": options.batch_tokens,
        "block_tokens": options.batch_tokens,
        "prefetch": 2,
    }
    if options.device == "cuda":
        policy["cache"] = (0.0, 1.0, 0.0)
    else:
        policy["weights"] = (0.0, 0.0, 1.0)  # so that buffers of another size move no layer
    return {
        "device": options.device,
        "dtype": options.dtype,
        "policy": policy,
        "offload_folder": str(offload_folder),
        "dummy_weights": options.model is not None,
        "max_memory": {"device": options.device_memory} if options.device_memory else None,
    }


def run_variants(options: argparse.Namespace, model: Path | str, limits: Limits, scratch: Path) -> list[Line]:
    """Run one variant after the other, and print each as it ends."""
    prompts = random_prompts(options.prompts, options.prompt_len, options.vocab_size)
    work = Work("ablation", prompts, options.new_tokens)
    common = all_on(options, limits.folders[-1])
    lines: list[Line] = []
    expected: list[list[int]] | None = None
    print(f"{'':30}{'token/s':>9}{'of all on':>11}{'disk read':>12}  sweeps bound by", flush=True)
    for variant in variants(options):
        arguments = {**common, **variant.arguments, "policy": {**common["policy"], **variant.policy}}
        ours = run_engine(work, model, arguments, limits, scratch)
        expected = expected or ours.answers.tokens
        lines.append(measure(variant, work, ours, equal=ours.answers.tokens == expected))
        print(render(lines[-1], lines[0]), flush=True)
        write_json(options.json, [asdict(line) for line in lines])
    return lines


def measure(variant: Variant, work: Work, ours: Ours, *, equal: bool) -> Line:
    """Take from a run what the table shows."""
    answers = ours.answers
    bound_by: dict[str, int] = answers.stats["per_sweep"]["bound_by"]
    return Line(variant, answers.seconds, answers.rate * work.new_tokens, answers.disk_read_bytes, bound_by, equal)


def render(line: Line, first: Line) -> str:
    """Make a row of the table."""
    bound_by = ", ".join(f"{name} {count}" for name, count in line.bound_by.items())
    share = line.tokens_per_second / first.tokens_per_second
    differs = "" if line.equal else "; ANSWERS DIFFER"
    return (
        f"{line.variant.name:30}{line.tokens_per_second:9.2f}{share:11.2f}{gib(line.disk_read_bytes):>12}  {bound_by}{differs}"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("offload_ablation", __doc__)
    parser.add_argument("--model", metavar="NAME", help="a config's name, for made-up weights (default: a random Llama)")
    parser.add_argument("--model-size", type=parse_size, default="4GiB", metavar="SIZE", help="of the random Llama")
    parser.add_argument("--memory", type=parse_size, metavar="SIZE", help="limit of every process (default: 2GiB on a CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--device-memory", metavar="SIZE", help="max_memory of the device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompts", type=int, default=24, metavar="N")
    parser.add_argument("--prompt-len", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="N")
    parser.add_argument("--vocab-size", type=int, default=Shape.vocab_size, metavar="N", help="of which prompts are made")
    parser.add_argument("--batch", type=int, default=16, metavar="SEQUENCES", help="gpu_batch_size")
    parser.add_argument("--batch-tokens", type=int, default=256, metavar="TOKENS", help="gpu_batch_tokens and block_tokens")
    add_json(parser)
    options = parser.parse_args(arguments)
    if options.memory is None and options.device == "cpu":
        options.memory = parse_size("2GiB")
    return options


@reports_errors
def main() -> int:
    """Run the command and return its exit status: 0 if all variants gave the same answers."""
    options = parse()
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        limits = Limits(options.memory, options.threads, (scratch, scratch / "slabs"))
        model: Path | str = options.model
        if options.model is None:
            folder = model = random_model(Shape(options.model_size, options.dtype))
            limits = replace(limits, folders=(folder, folder.with_name(f"{folder.name}-slabs")))
        lines = run_variants(options, model, limits, scratch)
    return 0 if all(line.equal for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())

"""How long a sweep takes against the bytes that it reads, for each way to store weights, with all weights on disk.

The same prompts are answered with weights of 16 bits and with compressed ones, each in a process of its own under the same
memory limit (a cgroup's, so root is needed: exit status 3 without). Sweeps that only decode are compared. At the first start
of a variant its weights are quantised, under the limit too; that is printed as loading and not counted.

The model is a random Llama, made once under $FLEXGEN_HELM_CACHE. Cost on two cores of a server CPU: about 40 minutes, most of
it quantising, and 15 GiB of disk.

Command: ``python -m flexgen_helm.runs.compressed_sweeps --model-size 4GiB --memory 2GiB --json result.json --plot result.png``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexgen_helm.memory.amounts import parse_size
from flexgen_helm.runs.command_line import add_json, exit_on_sigterm, make_parser, reports_errors, write_json
from flexgen_helm.runs.compressed_sweeps.plot import draw
from flexgen_helm.runs.compressed_sweeps.variants import Line, measure, title_row
from flexgen_helm.runs.larger_than_ram.contenders import Work, run_engine
from flexgen_helm.runs.memory_limit.cgroup import memory_group
from flexgen_helm.runs.memory_limit.model import Shape, random_model, random_prompts
from flexgen_helm.runs.memory_limit.process import Limits

PLAIN, LOSSLESS = "16", "16-lossless"
VARIANTS = (PLAIN, LOSSLESS, "w8", "w4", "w4-entropy")


def engine_arguments(options: argparse.Namespace, variant: str, slabs: Path) -> dict[str, Any]:
    """Keywords of ``Engine.from_pretrained``: all weights on disk, and all prompts enter together."""
    policy = {
        "weights": (0, 0, 1),
        "gpu_batch_size": options.prompts,
        "gpu_batch_tokens": 256,
        "block_tokens": options.prompts * (options.prompt_len + options.new_tokens),
    }
    return {
        "device": "cpu",
        "dtype": options.dtype,
        "compression": None if variant in (PLAIN, LOSSLESS) else variant,
        "policy": {**policy, "slab_coding": "lossless" if variant == LOSSLESS else "plain"},
        "offload_folder": str(slabs / variant),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("compressed_sweeps", __doc__)
    parser.add_argument("--model-size", type=parse_size, default="4GiB", metavar="SIZE", help="of the weights")
    parser.add_argument("--memory", type=parse_size, default="2GiB", metavar="SIZE", help="limit of every process")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16", help="of the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="NAME", help="16 and 16-lossless are not compressed")
    parser.add_argument("--prompts", type=int, default=16, metavar="N")
    parser.add_argument("--prompt-len", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=6, metavar="N")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the result as a PNG there")
    add_json(parser)
    return parser.parse_args(arguments)


def run_variants(options: argparse.Namespace, model: Path, scratch: Path) -> list[Line]:
    """Run one variant after the other, and print and write down each as it ends."""
    prompts = random_prompts(options.prompts, options.prompt_len, Shape.vocab_size)
    work, lines = Work("sweeps", prompts, options.new_tokens), list[Line]()
    slabs = model.with_name(f"{model.name}-variants")
    print(title_row(), flush=True)
    for variant in options.variants:
        arguments = engine_arguments(options, variant, slabs)
        own = slabs / variant
        own.mkdir(parents=True, exist_ok=True)
        limits = Limits(options.memory, options.threads, (model, own))
        lines.append(measure(variant, run_engine(work, model, arguments, limits, scratch)))
        print(lines[-1].render(lines[0]), flush=True)
        write_json(options.json, [asdict(line) for line in lines])
    return lines


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    options = parse()
    exit_on_sigterm()
    with memory_group(options.memory):
        pass  # whether it is permitted, before a model is made
    model = random_model(Shape(options.model_size, options.dtype))
    with tempfile.TemporaryDirectory() as scratch:
        lines = run_variants(options, model, Path(scratch))
    if options.plot is not None:
        draw(options.plot, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())

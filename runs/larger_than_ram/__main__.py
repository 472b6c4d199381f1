"""A model twice as large as the memory, from disk: the engine against Accelerate's disk offload under the same limit.

generation: prompts of random tokens, 8 new tokens each. Accelerate answers 1, 2, 4, 8, ... of them at a time until its
throughput falls or the memory ends; its best batch is compared.
shared_prefix: 5-shot MMLU as HELM asks it, one new token each, against Accelerate in the same way.
helm: a few instances through ``helm-run``, with the same policy in a deployment.

The model is a random Llama, made once under $FLEXGEN_HELM_CACHE; the memory limit is a cgroup's, so root is needed (exit
status 3 without). What is cached of the model is dropped first, since a cgroup is not charged for pages that are there
already. Loading, and the engine's slabs, which are written at its first load, are printed and not counted.
Cost on two cores of a server CPU: about 20 minutes, 9 GiB of disk.

With ``--slab-codings plain lossless`` the generation part alone is run, by the engine alone, with slabs of each coding.

Command: ``python -m flexgen_helm.runs.larger_than_ram --model-size 4GiB --memory 2GiB --json result.json``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from flexgen_helm.memory.amounts import parse_size
from flexgen_helm.runs.agreement import compare
from flexgen_helm.runs.command_line import add_json, exit_on_sigterm, make_parser, reports_errors, write_json
from flexgen_helm.runs.cpu_benchmark.prompts import helm_prompts
from flexgen_helm.runs.larger_than_ram import codings
from flexgen_helm.runs.larger_than_ram.contenders import Work, as_dict, run_accelerate, run_engine
from flexgen_helm.runs.larger_than_ram.helm_part import run_helm
from flexgen_helm.runs.larger_than_ram.report import render
from flexgen_helm.runs.memory_limit.cgroup import memory_group
from flexgen_helm.runs.memory_limit.model import Shape, random_model, random_prompts
from flexgen_helm.runs.memory_limit.process import Limits
from flexgen_helm.types import SLAB_CODINGS

POLICIES: dict[str, dict[str, Any]] = {
    "generation": {
        "weights": (0, 0, 1),
        "cache": (0.5, 0, 0.5),
        "block_tokens": 512,
        "gpu_batch_tokens": 512,
        "gpu_batch_size": 32,
    },
    "shared_prefix": {"block_tokens": 8192},
    "helm": {"block_tokens": 8192},
}
"""Policy of each part. Memory holds more of the cache where answers are long. Prompts enter a few at a time there, so that
every sweep computes while it reads. Prompts that share a prefix enter together, so that it is computed once."""
ENTRY = "mmlu:subject=us_foreign_policy,method=multiple_choice_joint"
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def engine_arguments(part: str, options: argparse.Namespace, slabs: Path) -> dict[str, Any]:
    """Keywords of ``Engine.from_pretrained``."""
    policy = {"gpu_batch_size": 16, "gpu_batch_tokens": 256, **POLICIES[part]}
    return {"device": "cpu", "dtype": options.dtype, "policy": policy, "offload_folder": str(slabs)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("larger_than_ram", __doc__)
    parser.add_argument("--model-size", type=parse_size, default="4GiB", metavar="SIZE", help="of the weights")
    parser.add_argument("--memory", type=parse_size, default="2GiB", metavar="SIZE", help="limit of every process")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both sides")
    parser.add_argument("--parts", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--prompts", type=int, default=64, metavar="N", help="of the generation part")
    parser.add_argument("--prompt-len", type=int, default=128, metavar="TOKENS", help="of the generation part")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="N", help="of the generation part")
    parser.add_argument(
        "--accelerate-memory",
        type=parse_size,
        default="16MiB",
        metavar="SIZE",
        help="for weights that Accelerate keeps in memory; what it does not keep is left for larger batches",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=BATCH_SIZES, metavar="N", help="sequences that Accelerate answers at a time"
    )
    parser.add_argument("--instances", type=int, default=64, metavar="N", help="of the shared-prefix part")
    compare = "compare slabs of these codings on the generation part, without Accelerate; needs --dtype bfloat16"
    parser.add_argument("--slab-codings", nargs="+", choices=SLAB_CODINGS, default=[], help=compare)
    add_json(parser)
    return parser.parse_args(arguments)


def run_parts(options: argparse.Namespace, model: Path, scratch: Path) -> None:
    """Run the parts one after the other, and print and write down each as it ends."""
    slabs = model.with_name(f"{model.name}-slabs")
    limits = Limits(options.memory, options.threads, (model, slabs))
    results: dict[str, Any] = {}
    if options.slab_codings:
        work, arguments = make_work("generation", options, model), engine_arguments("generation", options, slabs)
        found = codings.run_codings(work, model, arguments, limits, scratch, codings=options.slab_codings)
        print("\n".join(codings.render(work, found)), flush=True)
        write_json(options.json, {"slab_codings": codings.as_dict(found)})
        return
    for part in options.parts:
        arguments = engine_arguments(part, options, slabs)
        if part == "helm":
            lines = run_helm(ENTRY, model, arguments, limits, scratch / "helm", instances=8)
            results[part] = lines
        else:
            work = make_work(part, options, model)
            theirs = run_accelerate(
                work,
                model,
                options.dtype,
                limits,
                scratch,
                batch_sizes=options.batches,
                memory_bytes=options.accelerate_memory,
            )
            ours = run_engine(work, model, arguments, limits, scratch)
            agreement = compare(theirs.best[1].tokens, ours.answers.tokens, ours.answers.gaps)
            lines = render(work, theirs, ours, agreement)
            results[part] = as_dict(theirs, ours, agreement)
        print("\n".join(lines), flush=True)
        write_json(options.json, results)


def make_work(part: str, options: argparse.Namespace, model: Path) -> Work:
    """Make the prompts of a part."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if part == "generation":
        prompts = random_prompts(options.prompts, options.prompt_len, len(tokenizer))
        return Work(f"{options.prompt_len} random tokens", prompts, options.new_tokens)
    texts = helm_prompts(ENTRY, model, options.instances)
    return Work("5-shot MMLU", [tokenizer.encode(text, add_special_tokens=False) for text in texts], 1)


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    options = parse()
    exit_on_sigterm()
    with memory_group(options.memory):
        pass  # whether it is permitted, before a model is made
    model = random_model(Shape(options.model_size, options.dtype))
    with tempfile.TemporaryDirectory() as scratch:
        run_parts(options, model, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())

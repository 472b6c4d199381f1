"""The engine against FlexLLMGen, Accelerate and DeepSpeed ZeRO-Inference: the same model, memory limit and prompts.

Each contender is a process of its own, by an interpreter that is named; what is not installed or cannot serve the model here is
skipped with its reason. Peers answer 1, 2, 4, ... prompts at a time until their throughput falls or the memory ends, and the
best batch counts. Loading is not counted. The limit is a cgroup's, so root is needed (exit status 3 without).

On a CPU:  python -m flexgen_helm.runs.peers --deepspeed PYTHON --flexllmgen PYTHON --json result.json
On a GPU:  python -m flexgen_helm.runs.peers --model facebook/opt-30b --dtype float16 --device-memory 15GiB --memory 120GiB
           --prompts 144 --batches 4 8 16 32 --deepspeed PYTHON --flexllmgen PYTHON --json result.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexgen_helm.memory.amounts import gib, parse_size
from flexgen_helm.options import parse_policy
from flexgen_helm.runs.command_line import add_json, exit_on_sigterm, make_parser, reports_errors, write_json
from flexgen_helm.runs.larger_than_ram.contenders import Theirs, Work, run_engine
from flexgen_helm.runs.memory_limit.cgroup import memory_group
from flexgen_helm.runs.memory_limit.model import random_prompts
from flexgen_helm.runs.memory_limit.process import Limits
from flexgen_helm.runs.peers.contenders import MODULES, Setting, Skipped, probe, run_peer
from flexgen_helm.runs.peers.model import opt_folder
from flexgen_helm.runs.peers.published import PUBLISHED, Figure, read_pipeline
from flexgen_helm.runs.peers.report import as_dict, render, rows_of

SPECIAL_TOKENS = 4
"""Lowest token ids, which prompts leave out: OPT pads with one of them."""
PAPER = (48, 3, 20, 80, 0, 100, 0, 100)
"""FlexGen's own policy for OPT-30B on a GPU of 16 GB."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("peers", __doc__)
    add = parser.add_argument
    add("--model", metavar="M", help="folder of a model, or the name of an OPT such as facebook/opt-30b, for random weights")
    add("--model-size", type=parse_size, default="1GiB", metavar="SIZE", help="of a random OPT, without --model (%(default)s)")
    add("--memory", type=parse_size, default="832MiB", metavar="SIZE", help="limit of every process (%(default)s)")
    add("--device-memory", type=parse_size, metavar="SIZE", help="limit of the GPU's memory; a GPU computes")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of all contenders (%(default)s)")
    add("--threads", type=int, default=1, help="of all contenders (%(default)s)")
    add("--prompts", type=int, default=16, metavar="N", help="(%(default)s)")
    add("--prompt-len", type=int, default=512, metavar="TOKENS", help="(%(default)s)")
    add("--new-tokens", type=int, default=32, metavar="N", help="(%(default)s)")
    add("--batches", type=int, nargs="+", default=(1, 2, 4, 8, 16, 32, 64), metavar="N", help="prompts of a peer at a time")
    add("--policy", default="auto", help="of the engine, as for `flexgen-helm bench`; auto: planned (%(default)s)")
    add("--peers", nargs="+", choices=list(MODULES), default=list(MODULES), help="only these")
    for name, module in MODULES.items():
        add(f"--{name}", default=sys.executable, metavar="PYTHON", help=f"an interpreter that has {module} (this one)")
    names = ("BATCH", "BATCHES", "W_GPU", "W_CPU", "C_GPU", "C_CPU", "A_GPU", "A_CPU")
    add("--flexllmgen-policy", type=int, nargs=8, default=PAPER, metavar=names, help="sizes, and shares in per cent")
    add("--most-seconds", type=int, default=1800, metavar="S", help="for each process of a peer (%(default)s)")
    add("--pipeline", type=Path, metavar="FILE", help="figures of a pipeline, shown beside published ones; see README.md")
    add_json(parser)
    return parser.parse_args(arguments)


def make_setting(options: argparse.Namespace, scratch: Path) -> tuple[Setting, Path]:
    """Make the model and the prompts; returns them with the folder of the engine's slabs."""
    given = Path(options.model) if options.model else None
    model = given if given and given.is_dir() else opt_folder(options.model or options.model_size, options.dtype)
    slabs = scratch / "slabs"
    limits = Limits(options.memory, options.threads, (model, slabs))
    vocab_size = Setting(model, "", Work("", [], 0), limits, scratch, None, (), (), 0).config["vocab_size"]
    tokens = random_prompts(options.prompts, options.prompt_len, vocab_size - SPECIAL_TOKENS)
    prompts = [[token + SPECIAL_TOKENS for token in prompt] for prompt in tokens]
    setting = Setting(
        model=model,
        dtype=options.dtype,
        work=Work(f"{options.prompt_len} random tokens", prompts, options.new_tokens),
        limits=limits,
        scratch=scratch,
        device_bytes=options.device_memory,
        batches=tuple(options.batches),
        flexllmgen_policy=tuple(options.flexllmgen_policy),
        most_seconds=options.most_seconds,
    )
    return setting, slabs


def engine_arguments(options: argparse.Namespace, slabs: Path) -> dict[str, Any]:
    """Keywords of ``Engine.from_pretrained``."""
    policy = asdict(parse_policy(options.policy))
    found: dict[str, Any] = {"dtype": options.dtype, "policy": policy, "offload_folder": str(slabs), "device": "cpu"}
    if options.device_memory is not None:
        found |= {"device": "cuda", "max_memory": {"device": options.device_memory}}
    return found


def measure(setting: Setting, options: argparse.Namespace) -> dict[str, Theirs | Skipped]:
    """Measure the peers that can run here."""
    found: dict[str, Theirs | Skipped] = {}
    for name in options.peers:
        interpreter = getattr(options, name)
        version = probe(name, interpreter, setting)
        if not isinstance(version, Skipped):
            print(f"{name} {version}", file=sys.stderr, flush=True)
        found[name] = version if isinstance(version, Skipped) else run_peer(name, interpreter, setting)
    return found


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    options = parse()
    figures: list[Figure] = [*(read_pipeline(options.pipeline) if options.pipeline else []), *PUBLISHED]
    exit_on_sigterm()
    with memory_group(options.memory):
        pass  # whether it is permitted, before a model is made
    with tempfile.TemporaryDirectory() as folder:
        setting, slabs = make_setting(options, Path(folder))
        work = setting.work
        ours = run_engine(work, setting.model, engine_arguments(options, slabs), setting.limits, setting.scratch)
        rows = rows_of(work, ours, measure(setting, options))
    size = sum(file.stat().st_size for file in setting.model.glob("*.safetensors"))
    limit = f"{gib(options.memory)}" + (f" and {gib(options.device_memory)} of a GPU" if options.device_memory else "")
    asked = f"{len(work.prompts)} prompts of {options.prompt_len} tokens, {work.new_tokens} new ones"
    print("\n".join(render(f"{setting.model.name}, {gib(size)} in {limit}, {options.dtype}: {asked}", rows, figures)))
    write_json(options.json, as_dict(rows, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())

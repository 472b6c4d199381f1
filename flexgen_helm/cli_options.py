"""The options of `flexgen-helm`, in groups that several commands share. No torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexgen_helm.compression.config import parse, resolve, with_variant
from flexgen_helm.errors import PolicyError
from flexgen_helm.evaluation.choices import CHOICES, DTYPES, KV_DTYPES, ROWS, parse_profile, plain_choices
from flexgen_helm.options import parse_max_memory, parse_policy
from flexgen_helm.policy.planner.pipeline.network import parse_network
from flexgen_helm.types import SLAB_CODINGS, TIERS, Policy


def parse_model(text: str) -> str:
    """Return the name of a model with its variant in canonical form, in which it is printed and reported.

    Raises:
        CompressionError: If there is no such variant.
    """
    return with_variant(*resolve(text))


def add_model_options(parser: argparse.ArgumentParser, *, read: Callable[[str], str] = parse_model) -> None:
    """Add options that choose a model, its dtype, its device and its rows.

    Args:
        parser: Gets the options.
        read: Makes the name of the model of what the user writes.
    """
    group = parser.add_argument_group("model")
    model = "model folder, or name on the model hub; with @w4 and the like a compressed variant of it (docs/compression.md)"
    group.add_argument("--model", required=True, type=read, metavar="M", help=model)
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's on a GPU, float32 on a CPU")
    group.add_argument("--device", default="auto", metavar="D", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    group.add_argument("--rows", default="auto", choices=ROWS, help="several sequences per row, or one (%(default)s)")
    group.add_argument("--recheck", action="store_true", help="repeat the self-check, though the model passed it before here")
    compiled = "compile what lies between products and attention, once on a machine; answers differ in the last digits"
    group.add_argument("--compile-layers", action="store_true", help=compiled)


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """Add options that place weights, K/V cache and hidden states on tiers."""
    add = parser.add_argument_group("placement").add_argument
    policy = "sizes and shares, as JSON or as weights=0.2:0.8:0,prefetch=2 (shares are device:host:disk)"
    add("--policy", type=parse_policy, metavar="P", help=policy)
    coding = "weights in 16 bits on disk: as they are, or in fewer bytes without loss (default: what makes sweeps shorter)"
    add("--slab-coding", choices=SLAB_CODINGS, help=coding)
    memory = "memory limit of each tier, such as device=15GiB,host=100GiB"
    add("--max-memory", type=parse_max_memory, metavar="M", help=memory)
    add(
        "--offload-folder", type=Path, metavar="DIR", help="folder for everything placed on disk (default: in the cache folder)"
    )
    add("--profile", type=parse_profile, metavar="NAME|FILE", help="machine for which a policy is searched (default: this one)")
    add("--kv-dtype", choices=KV_DTYPES, help="dtype of the K/V cache (default: the model's; changes results)")


def add_observation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that show what happens, for commands that run the engine themselves."""
    parser.add_argument("--trace", type=Path, metavar="F", help="write a timeline that https://ui.perfetto.dev opens")
    seconds = "also print the engine's log, and the seconds of imports and of loading"
    parser.add_argument("-v", "--verbose", action="store_true", help=seconds)


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench`."""
    add = parser.add_argument_group("benchmark").add_argument
    add("--dummy-weights", action="store_true", help="random weights; --model may be a config's name, such as facebook/opt-30b")
    add("--prompt-len", type=_positive, default=512, metavar="N", help="tokens of each prompt (%(default)s)")
    add("--gen-len", type=_positive, default=32, metavar="N", help="tokens generated for each (%(default)s)")
    add("--num-prompts", type=_positive, metavar="N", help="number of prompts (default: as many as take about a minute)")
    add("--score", action="store_true", help="score the prompts only, as for multiple choice")
    add(
        "--order",
        default="zigzag",
        choices=["zigzag", "row"],
        help="zigzag: layer by layer over all rows; row: row by row (%(default)s)",
    )
    add(
        "--free-shapes",
        action="store_true",
        help="rows without padding, which shows what exactness costs",
    )
    add("--warm-up", action="store_true", help="run other prompts first")
    add("--json", action="store_true", help="print one JSON object")


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times")
    add("--prompt-file", metavar="F", help="file that holds one prompt; - for standard input")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="limit for each completion (%(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the most likely token")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens whose probability reaches P (%(default)s)",
    )
    add("--seed", type=int, default=0, metavar="S", help="seed of the samples (%(default)s)")
    add("--num-completions", type=int, default=1, metavar="K", help="completions of each prompt (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--json", action="store_true", help="print one JSON object for each prompt, with tokens and log-probabilities")


def add_suite_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `eval`."""
    add = parser.add_argument_group("evaluation").add_argument
    packaged = "quickstart, mmlu, accuracy_vs_compression, ...; flexgen-helm suites lists them"
    suite = f"a suite that comes with this package ({packaged}), or the path of a run_entries.conf"
    add("--suite", required=True, metavar="S", help=suite)
    instances = "maximum number of instances per run entry (%(default)s)"
    add("-m", "--max-eval-instances", type=_positive, default=100, metavar="N", help=instances)
    add("--out", type=Path, default=Path("benchmark_output"), metavar="DIR", help="HELM's output folder (%(default)s)")
    add("-v", "--verbose", action="store_true", help="also show HELM's log, which is written to a file in the output folder")
    add = parser.add_argument_group("several workers").add_argument
    add("--workers", type=_positive, metavar="N", help="divide the requests among N processes, GPUs or hosts, by Ray")
    add("--gpus-per-worker", type=_share, metavar="G", help="GPUs of each worker (default: one, where there are any)")
    add("--ray-address", metavar="ADDR", help="host:port of a Ray cluster, or auto (default: one is started for the command)")


def add_suites_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `suites`."""
    add = parser.add_argument_group("what is shown").add_argument
    add("--suite", metavar="S", help="one suite in detail: its name, or the path of a run_entries.conf")
    add("--json", action="store_true", help="print one JSON object, for all suites a list")
    add = parser.add_argument_group("what it takes").add_argument
    model = "count requests and tokens for this model folder or name, and predict hours; with @w4 and the like for a variant"
    add("--model", metavar="M", help=model)
    instances = "maximum number of instances per run entry (%(default)s)"
    add("-m", "--max-eval-instances", type=_positive, default=100, metavar="N", help=instances)
    output = "HELM's output folder, in which data are looked for and put (%(default)s)"
    add("--out", type=Path, default=Path("benchmark_output"), metavar="DIR", help=output)
    add("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's on a GPU, float32 on a CPU")
    _add_machine_options(add)
    parser.add_argument("-v", "--verbose", action="store_true", help="also print the log")
    parser.set_defaults(compile_layers=False)


def _add_machine_options(add: Callable[..., Any]) -> None:
    """Add what chooses the machine of a plan."""
    add("--machine", metavar="NAME|FILE", help="t4, h100, h200, laptop-8gib, or a profile's file (default: this machine)")
    add("--device", default="auto", metavar="D", help="device of this machine: auto, cpu, cuda or cuda:N")
    add("--max-memory", type=parse_max_memory, metavar="M", help="memory limit of each tier: device=15GiB,host=100GiB")


def add_fidelity_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fidelity`."""
    add = parser.add_argument_group("candidate (at least one)").add_argument
    add("--candidate", metavar="M", help="another model folder or name (default: --model)")
    add("--candidate-dtype", choices=KV_DTYPES, help="dtype of the candidate (default: --dtype)")
    add("--compression", metavar="C", help="compression of the candidate, such as w4")
    add = parser.add_argument_group("text").add_argument
    add("--text", type=Path, metavar="F", help="file of UTF-8 text (default: a speech that the package fetches)")
    add("--jobs", type=Path, metavar="F", help='file of jobs: lines such as {"prompt": "..."} or {"token_ids": [1, 2]}')
    add("--window", type=_positive, metavar="N", help="tokens of a window (default: 512, or the models' context)")
    add("--max-tokens", type=_positive, metavar="N", help="most tokens of the text (default: all)")
    add("--block-tokens", type=_positive, default=8192, metavar="N", help="tokens in memory at a time (%(default)s)")
    noise = "tokens on which the noise floor is measured; 0 leaves it out (%(default)s)"
    add("--noise-tokens", type=int, default=2048, metavar="N", help=noise)
    add = parser.add_argument_group("result").add_argument
    add("--per-layer", action="store_true", help="also measure the error of each layer's weights and output")
    add("--out", type=Path, metavar="DIR", help="folder of the result (default: fidelity in the cache folder)")
    add("--no-plot", action="store_true", help="draw no PNG")
    add("--json", action="store_true", help="print one JSON object")
    add("-v", "--verbose", action="store_true", help="also print the log of both engines")


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `profile`."""
    add = parser.add_argument_group("what is measured").add_argument
    add("--model", type=parse_model, metavar="M", help="measure at this model's sizes, and its layers; a config is enough")
    add("--dtype", default="auto", choices=DTYPES, help="auto: the checkpoint's on a GPU, float32 on a CPU")
    add("--device", default="auto", metavar="D", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    add("--compile-layers", action="store_true", help="measure the model's layers compiled")
    add("--offload-folder", type=Path, metavar="DIR", help="folder on the disk to measure (default: the cache folder)")
    add = parser.add_argument_group("result").add_argument
    add("--out", type=Path, metavar="FILE", help="write the profile as JSON")
    add("--json", action="store_true", help="print the profile as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="also print the log")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan`."""
    add = parser.add_argument_group("model").add_argument
    add("--model", type=parse_model, metavar="M", help="model folder or name; @w4kv4 and the like name variants")
    add("--config", type=Path, metavar="FILE", help="config.json of a model that has no weights here")
    add(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="auto: the checkpoint's on a GPU, float32 on a CPU",
    )
    add("--compile-layers", action="store_true", help="plan for compiled layers, of which the profile must have times")
    add("--allow", nargs="+", default=[], type=parse, metavar="V", help="variants that may be chosen where faster: w4 w4kv4")
    add = parser.add_argument_group("machine").add_argument
    _add_machine_options(add)
    add("--without", action="append", default=[], choices=TIERS, help="tier that must not be used; may be given several times")
    add = parser.add_argument_group("workload").add_argument
    add("--num-jobs", type=_positive, default=512, metavar="N", help="number of prompts (%(default)s)")
    add("--prompt-len", type=_positive, default=512, metavar="N", help="tokens of each prompt (%(default)s)")
    add(
        "--gen-len", type=_count, default=32, metavar="N", help="tokens generated for each; 0: prompts are scored (%(default)s)"
    )
    add = parser.add_argument_group("policy").add_argument
    add("--policy", type=parse_policy, metavar="P", help="fields that are kept, as JSON or as weights=0.2:0.8:0,prefetch=2")
    add("--max-latency", type=float, metavar="S", help="most seconds until the first job is answered")
    add("--min-throughput", type=float, metavar="T", help="least new tokens per second")
    add("--search-numerics", action="store_true", help="also choose row sizes and the place of attention, which change bits")
    _add_pipeline_options(parser)
    add = parser.add_argument_group("result").add_argument
    add("--json", action="store_true", help="print one JSON object")
    replay = (
        "explain a run that is over: its flexgen.json, or what `bench --json` printed; nothing else but --json is used then"
    )
    add("--replay", type=Path, metavar="FILE", help=replay)
    add("--plot", type=Path, metavar="DIR", help="draw the latency-throughput frontier and the timeline of one sweep")
    parser.add_argument("-v", "--verbose", action="store_true", help="also print the log")


def _add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pipeline").add_argument
    stages = "divide the layers over so many equal machines in a row; auto: 1, 2, 4, ... of them, to see how many pay"
    add("--stages", type=_stages, metavar="N|auto", help=stages)
    most = "most stages that --stages auto tries (16, or the model's layers)"
    add("--most-stages", type=_positive, metavar="N", help=most)
    add("--lanes", type=_positive, metavar="N", help="sweeps in flight (default: as many as stages)")
    network = "rate and latency between two stages, such as 1Gbit/s,10ms (default: it takes no time)"
    add("--network", type=parse_network, metavar="RATE,LATENCY", help=network)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `report`."""
    add = parser.add_argument_group("runs").add_argument
    suite = "suite folder of HELM, or a suite's name; behind a colon a model in it"
    add("--baseline", required=True, metavar="SUITE[:MODEL]", help=suite)
    more = "the same, one or several; a suite alone stands for all its models but the baseline"
    add("--candidates", required=True, nargs="+", metavar="SUITE[:MODEL]", help=more)
    add = parser.add_argument_group("report").add_argument
    add("--out", type=Path, default=Path("report"), metavar="DIR", help="folder of the report (%(default)s)")
    note = "a line that readers must know, shown below the title of every page; can be repeated"
    add("--note", action="append", default=[], metavar="TEXT", help=note)
    _add_comparison_options(parser)


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `check`."""
    add = parser.add_argument_group("runs").add_argument
    source = "suite of HELM, behind a colon a model in it; or a baseline file; or samples of lm-eval, a file or a folder"
    add("--baseline", required=True, metavar="RUNS|FILE", help=source)
    more = "the same, one or several; a suite alone stands for all its models but the baseline"
    add("--candidates", "--candidate", nargs="+", default=[], metavar="RUNS|FILE", help=more)
    add = parser.add_argument_group("gates").add_argument
    add("--config", type=Path, metavar="FILE", help="YAML file of gates and thresholds (default: see docs/gate.md)")
    add("--record", type=Path, metavar="FILE", help="write the baseline to a file that is small enough to commit")
    add("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")
    add("--json", type=Path, metavar="FILE", help="write the verdicts as JSON")
    _add_comparison_options(parser)


def _add_comparison_options(parser: argparse.ArgumentParser) -> None:
    """Add what `report` and `check` share."""
    add = parser.add_argument_group("comparison").add_argument
    output = "HELM's output folder, for suites given by name (%(default)s)"
    add("--output-path", type=Path, default=Path("benchmark_output"), metavar="DIR", help=output)
    add("--common-runs", action="store_true", help="leave out run entries that one side lacks")
    add("--other-models", action="store_true", help="allow candidates that are another model than the baseline")
    fidelity = "results of `flexgen-helm fidelity` (default: all in the cache folder)"
    add("--fidelity", type=Path, nargs="+", metavar="FILE", help=fidelity)
    schema = "schema of HELM that names the main metrics (default: schema.json of the baseline's suite, if there is one)"
    add("--schema-path", type=Path, metavar="FILE", help=schema)
    add("-v", "--verbose", action="store_true", help="also print the log")


def _positive(text: str) -> int:
    return _count(text, least=1)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of GPUs; give 0 or more")
    return value


def _stages(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _count(text: str, least: int = 0) -> int:
    number = int(text) if text.isascii() and text.isdigit() else -1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give {least} or more")
    return number


def asked_policy(args: argparse.Namespace) -> Policy | None:
    """Return the policy that ``--policy`` and ``--slab-coding`` ask for together; None if neither is given.

    Raises:
        PolicyError: If they contradict each other.
    """
    policy: Policy | None = args.policy
    if args.slab_coding is None:
        return policy
    policy = policy or Policy(auto=True)
    if policy.slab_coding not in ("auto", args.slab_coding):
        raise PolicyError(f"--slab-coding is {args.slab_coding}, but --policy says {policy.slab_coding}. Leave one out.")
    return dataclasses.replace(policy, slab_coding=args.slab_coding)


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that the user gave for the engine, such as dtype and policy, as plain data for YAML."""
    return plain_choices({name: getattr(args, name) for name in CHOICES} | {"policy": asked_policy(args)})

"""The command `flexgen-helm`. Everything that needs torch is loaded when a command runs, so that --help is quick."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_helm.errors import FlexGenError, InvalidJob
from flexgen_helm.options import parse_max_memory, parse_policy
from flexgen_helm.types import Job, Result

if TYPE_CHECKING:
    from flexgen_helm.runtime.engine import Engine

EngineLoader = Callable[[argparse.Namespace], "Engine"]


def main(argv: Sequence[str] | None = None, *, load_engine: EngineLoader | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 after an error of the user's, or that of HELM.

    Args:
        argv: Arguments without the program's name; None: those of the process.
        load_engine: Makes the engine from the parsed arguments.
    """
    try:
        args = _parser(load_engine or _load_engine).parse_args(argv)
        status: int = args.run(args)
    except FlexGenError as error:
        message = " ".join(str(error).split())
        print(f"flexgen-helm: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flexgen-helm: interrupted", file=sys.stderr)
        return 130
    return status


def _parser(load_engine: EngineLoader) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-helm", description="Run language models that are larger than the GPU or the RAM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('flexgen_helm')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate = commands.add_parser(
        "generate", help="continue prompts", description="Continue prompts and print the generated text."
    )
    _add_model_options(generate)
    _add_placement_options(generate)
    _add_job_options(generate)
    generate.set_defaults(run=partial(_generate, load_engine=load_engine), few_requests=True)
    bench = commands.add_parser(
        "bench",
        help="measure throughput",
        description="Run random prompts of one length through prefill and decoding and print rates, limit and peaks.",
    )
    _add_model_options(bench)
    _add_placement_options(bench)
    _add_bench_options(bench)
    bench.set_defaults(run=partial(_bench, load_engine=load_engine), few_requests=False)
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model with HELM",
        description="Run a suite of HELM's scenarios, print the scores and where everything is.",
    )
    _add_suite_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="M", help="model folder, or name on the model hub")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    group.add_argument("--dtype", default="auto", choices=dtypes, help="auto: the checkpoint's on a GPU, float32 on a CPU")
    group.add_argument("--device", default="auto", metavar="D", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    rows = ["auto", "packed", "single"]
    group.add_argument("--rows", default="auto", choices=rows, help="many sequences in a row, or one each (%(default)s)")


def _add_placement_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("placement").add_argument
    policy = "sizes and shares, as JSON or such as weights=0.2:0.8:0,prefetch=2 (shares are device:host:disk)"
    add("--policy", type=parse_policy, metavar="P", help=policy)
    memory = "most memory of each tier, such as device=15GiB,host=100GiB"
    add("--max-memory", type=parse_max_memory, metavar="M", help=memory)
    add("--offload-folder", type=Path, metavar="DIR", help="for what is placed on disk")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--kv-dtype", choices=dtypes, help="of the K/V cache, which is part of the numerics (the model's)")
    add("--trace", type=Path, metavar="F", help="write a timeline that https://ui.perfetto.dev opens")


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("benchmark").add_argument
    add("--dummy-weights", action="store_true", help="random weights; --model may be a config's name, such as facebook/opt-30b")
    add("--prompt-len", type=_positive, default=512, metavar="N", help="tokens of each prompt (%(default)s)")
    add("--gen-len", type=_positive, default=32, metavar="N", help="tokens generated for each (%(default)s)")
    add("--num-prompts", type=_positive, metavar="N", help="(gpu_batch_size * num_gpu_batches)")
    add("--score", action="store_true", help="only read the prompts, as for multiple choice")
    add("--order", default="zigzag", choices=["zigzag", "row"], help="of the operations (%(default)s)")
    add("--warm-up", action="store_true", help="run other prompts before")
    add("--json", action="store_true", help="print one JSON object")


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be given several times")
    add("--prompt-file", metavar="F", help="file that holds one prompt; - for standard input")
    add("--max-new-tokens", type=int, default=16, metavar="N", help="limit for each completion (%(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the most likely token")
    add("--top-p", type=float, default=1.0, metavar="P", help="share of the probability to draw from (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of the samples (%(default)s)")
    add("--num-completions", type=int, default=1, metavar="K", help="for each prompt (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--json", action="store_true", help="print one JSON object for each prompt, with tokens and log-probabilities")


def _add_suite_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="model folder, or name on the model hub")
    suite = "a suite that comes with this package (quickstart, mmlu, flexgen_paper), or the path of a run_entries.conf"
    add("--suite", required=True, metavar="S", help=suite)
    instances = "instances of each run entry (%(default)s)"
    add("-m", "--max-eval-instances", type=_positive, default=100, metavar="N", help=instances)
    add("--out", type=Path, default=Path("benchmark_output"), metavar="DIR", help="HELM's output folder (%(default)s)")


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not number:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give 1 or more")
    return number


def _evaluate(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("helm") is None:
        raise FlexGenError('HELM is not installed. Install it with `pip install "flexgen_helm[helm]"`.')
    from flexgen_helm.evaluation.evaluate import evaluate, make_evaluation

    return evaluate(make_evaluation(args.model, args.suite, args.out, args.max_eval_instances))


def _bench(args: argparse.Namespace, load_engine: EngineLoader) -> int:
    from flexgen_helm.benchmark import Workload, measure

    begun = time.perf_counter()
    with load_engine(args) as engine:
        seconds = time.perf_counter() - begun
        workload = Workload(args.prompt_len, args.gen_len, args.num_prompts or engine.policy.block_size, args.score)
        options = {"model": args.model, "load_seconds": seconds, "warm_up": args.warm_up, "trace": args.trace}
        measured = measure(engine, workload, **options)
    print(json.dumps(measured.as_dict()) if args.json else "\n".join(measured.lines()))
    return 0


def _generate(args: argparse.Namespace, load_engine: EngineLoader) -> int:
    prompts = _prompts(args)
    jobs = [
        Job(
            prompt=prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            num_completions=args.num_completions,
            seed=args.seed,
            stop=tuple(args.stop),
        )
        for prompt in prompts
    ]
    from flexgen_helm.runtime.trace import traced

    with load_engine(args) as engine, traced(engine, args.trace):
        results = engine.run(jobs)
    for prompt, result in zip(prompts, results, strict=True):
        if args.json:
            print(json.dumps(_as_json(prompt, result), ensure_ascii=False))
        else:
            _print_texts(prompt, result, headed=len(prompts) * args.num_completions > 1)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(args.prompt)
    if args.prompt_file is not None:
        prompts.append(_read_prompt(args.prompt_file))
    if not prompts:
        raise InvalidJob("There is nothing to continue. Give --prompt TEXT or --prompt-file F.")
    return prompts


def _read_prompt(file: str) -> str:
    """Return the text of a file or of standard input as its bytes are, but for a byte-order mark at the beginning."""
    source = "standard input" if file == "-" else f"the prompt file {file}"
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidJob(f"The prompt in {source} cannot be read ({error}). Give UTF-8 text.") from None
    if not text:
        raise InvalidJob(f"There is nothing to continue: {source} is empty. Give UTF-8 text.")
    return text


def _print_texts(prompt: str, result: Result, *, headed: bool) -> None:
    for number, completion in enumerate(result.completions, start=1):
        if headed:
            start = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            print(f"--- {start!r}, completion {number} ---")
        print(completion.text)


def _as_json(prompt: str, result: Result) -> dict[str, object]:
    completions = [asdict(completion) for completion in result.completions]
    return {"prompt": prompt, "prompt_token_ids": result.prompt_token_ids, "completions": completions}


def _load_engine(args: argparse.Namespace) -> Engine:
    from transformers.utils import logging

    from flexgen_helm.runtime.engine import Engine
    from flexgen_helm.runtime.sizes import resolve_device, resolved

    logging.disable_progress_bar()
    policy = resolved(args.policy, resolve_device(args.device), few_requests=args.few_requests)
    given = {name: getattr(args, name, None) for name in ("max_memory", "offload_folder", "kv_dtype", "order", "dummy_weights")}
    options = {name: value for name, value in given.items() if value}
    return Engine.from_pretrained(args.model, dtype=args.dtype, device=args.device, policy=policy, rows=args.rows, **options)


if __name__ == "__main__":
    sys.exit(main())

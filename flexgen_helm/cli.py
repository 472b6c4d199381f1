"""The command `flexgen-helm`. Everything that needs torch is loaded when a command runs, so that --help is quick."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_helm.errors import FlexGenError, InvalidJob
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
    args = _parser(load_engine or _load_engine).parse_args(argv)
    try:
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
    _add_job_options(generate)
    generate.set_defaults(run=partial(_generate, load_engine=load_engine))
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of instances; give 1 or more")
    return number


def _evaluate(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("helm") is None:
        raise FlexGenError('HELM is not installed. Install it with `pip install "flexgen_helm[helm]"`.')
    from flexgen_helm.evaluation.evaluate import evaluate, make_evaluation

    return evaluate(make_evaluation(args.model, args.suite, args.out, args.max_eval_instances))


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
    with load_engine(args) as engine:
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
        try:
            prompts.append(sys.stdin.read() if args.prompt_file == "-" else Path(args.prompt_file).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidJob(
                f"The prompt file {args.prompt_file} cannot be read ({error}). Give a file of UTF-8 text."
            ) from None
    if not prompts:
        raise InvalidJob("There is nothing to continue. Give --prompt TEXT or --prompt-file F.")
    return prompts


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
    from flexgen_helm.runtime.sizes import resolve_device, small_policy

    logging.disable_progress_bar()
    policy = small_policy(resolve_device(args.device))
    return Engine.from_pretrained(args.model, dtype=args.dtype, device=args.device, policy=policy, rows=args.rows)


if __name__ == "__main__":
    sys.exit(main())

"""The command `flexgen-helm`. Modules that need torch are imported when a command runs, so that --help is quick."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_helm.cli_options import (
    add_bench_options,
    add_check_options,
    add_fidelity_options,
    add_job_options,
    add_model_options,
    add_observation_options,
    add_placement_options,
    add_plan_options,
    add_profile_options,
    add_report_options,
    add_suite_options,
    add_suites_options,
    asked_policy,
    engine_arguments,
)
from flexgen_helm.errors import FlexGenError, InvalidJob
from flexgen_helm.helm.installed import require_helm
from flexgen_helm.processes import is_follower, num_processes
from flexgen_helm.types import Job, Policy, Result

if TYPE_CHECKING:
    from flexgen_helm.policy.planner.workload import Workload
    from flexgen_helm.runtime.engine import Engine

AGAIN = "The same command starts again from the beginning."
"""Text for an interrupted command that keeps no results."""
MOST_PROMPTS = 256
"""Prompts of a benchmark that a policy is searched for, where their number depends on the machine."""
SHOWN = ("flexgen_helm.runtime.progress", "flexgen_helm.runtime.planning")
"""Loggers whose lines are shown without ``--verbose``: progress, and what was planned before."""
EngineLoader = Callable[[argparse.Namespace], "Engine"]


def main(argv: Sequence[str] | None = None, *, load_engine: EngineLoader | None = None) -> int:
    """Run the command line and return the exit code: 0, 2 after an error of the user's, 130 if interrupted, or HELM's code.

    Args:
        argv: Arguments without the program's name; None: those of the process.
        load_engine: Function that makes the engine from the parsed arguments; None: load it with `Engine.from_pretrained`.
    """
    try:
        args = _parser(load_engine or _load_engine).parse_args(argv)
        return _run(args) if num_processes() == 1 else _run_stage(args)
    except FlexGenError as error:
        message = " ".join(str(error).split())
        print(f"flexgen-helm: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"flexgen-helm: interrupted. {str(interrupt) or AGAIN}", file=sys.stderr)
        return 130


@contextmanager
def _log_on_screen(*names: str) -> Iterator[None]:
    """Show what some loggers say, which includes the lines that replace a progress bar if standard error is no terminal."""
    handler = logging.StreamHandler()
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)


def _run(args: argparse.Namespace) -> int:
    with _log_on_screen(*(["flexgen_helm"] if args.verbose else SHOWN)):
        return int(args.run(args))


def _run_stage(args: argparse.Namespace) -> int:
    """Run the command if this process is the first that a launcher such as `torchrun` started; the others follow it."""
    from flexgen_helm.runtime.pipeline.launch import driving, follow_first

    if not is_follower():
        with driving():
            return _run(args)
    with _log_on_screen(*(["flexgen_helm"] if args.verbose else [])):
        return follow_first()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser(load_engine: EngineLoader) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-helm", description="Run language models that are larger than the GPU or the RAM."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('flexgen_helm')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate = commands.add_parser(
        "generate", help="continue prompts", description="Continue prompts and print the generated text."
    )
    add_model_options(generate)
    add_placement_options(generate)
    add_observation_options(generate)
    add_job_options(generate)
    generate.set_defaults(run=partial(_generate, load_engine=load_engine), few_requests=True)
    bench = commands.add_parser(
        "bench",
        help="measure throughput",
        description="Run random prompts of one length through prefill and decoding and print rates, limit and peaks.",
    )
    add_model_options(bench)
    add_placement_options(bench)
    add_observation_options(bench)
    add_bench_options(bench)
    bench.set_defaults(run=partial(_bench, load_engine=load_engine), few_requests=False)
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model with HELM",
        description="Run a suite of HELM's scenarios, print the scores and where everything is.",
    )
    add_model_options(evaluate, read=str)  # which may be a deployment's name
    add_placement_options(evaluate)
    add_suite_options(evaluate)
    evaluate.set_defaults(run=_evaluate)
    suites = commands.add_parser(
        "suites",
        help="list suites and what they take",
        description="List suites of HELM's scenarios; with --model how much they ask and how many hours that takes here.",
    )
    add_suites_options(suites)
    suites.set_defaults(run=_suites)
    fidelity = commands.add_parser(
        "fidelity",
        help="compare what two models predict",
        description="Run a reference and a candidate over the same text and print how far the candidate's predictions are off.",
    )
    add_model_options(fidelity)
    add_placement_options(fidelity)
    add_fidelity_options(fidelity)
    fidelity.set_defaults(run=partial(_fidelity, load_engine=load_engine), few_requests=False)
    _add_planning(commands)
    _add_comparisons(commands)
    return parser


def _add_planning(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that measure a machine and predict a run."""
    profile = commands.add_parser(
        "profile",
        help="measure this machine",
        description="Measure how fast this machine computes and moves bytes, print it, and write it as JSON.",
    )
    add_profile_options(profile)
    profile.set_defaults(run=_profile)
    plan = commands.add_parser(
        "plan",
        help="choose a policy and predict a run",
        description="Choose the policy under which a workload takes least time on a machine, and print what it will take.",
    )
    add_plan_options(plan)
    plan.set_defaults(run=_plan)


def _add_comparisons(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands that compare runs."""
    report = commands.add_parser(
        "report",
        help="compare evaluations",
        description="Compare runs of HELM with those of a baseline and write a report: scores, flips, bits, speed.",
    )
    add_report_options(report)
    report.set_defaults(run=_report)
    check = commands.add_parser(
        "check",
        help="pass or fail evaluations in CI",
        description="Check runs against a baseline: 0 if they pass, 1 after a regression, 2 if it could not be decided.",
    )
    add_check_options(check)
    check.set_defaults(run=_check)


def _report(args: argparse.Namespace) -> int:
    require_helm()
    from flexgen_helm.reports.presentation.command import report

    return report(args, _say)


def _check(args: argparse.Namespace) -> int:
    require_helm()
    from flexgen_helm.gate.command import run_check

    return run_check(args, _say)


def _profile(args: argparse.Namespace) -> int:
    from flexgen_helm.runtime.planning.profile_command import run_profile

    return run_profile(args, _say)


def _plan(args: argparse.Namespace) -> int:
    if args.replay is not None:
        from flexgen_helm.runtime.planning.explain import run_replay

        return run_replay(args.replay, as_json=args.json)
    args.model = args.model or (None if args.config is None else str(args.config))
    if args.model is None:
        raise FlexGenError("plan has no model. Give --model M or --config FILE, or --replay FILE for a run that is over.")
    from flexgen_helm.runtime.planning.command import run_plan

    return run_plan(args, _say)


def _evaluate(args: argparse.Namespace) -> int:
    require_helm()
    from flexgen_helm.evaluation.evaluate import evaluate, make_evaluation
    from flexgen_helm.helm.disk_errors import RESUME
    from flexgen_helm.workers.options import Workers

    workers = None if args.workers is None else Workers(args.workers, args.gpus_per_worker, args.ray_address)
    if workers is not None:
        workers.check()
    elif args.gpus_per_worker is not None or args.ray_address is not None:
        raise FlexGenError("--gpus-per-worker and --ray-address need several workers. Give --workers N too, or leave them out.")
    arguments = engine_arguments(args)
    evaluation = make_evaluation(args.model, args.suite, args.out, args.max_eval_instances, arguments)
    evaluation = replace(evaluation, workers=workers)
    try:
        return evaluate(evaluation, verbose=args.verbose)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(RESUME) from None


def _suites(args: argparse.Namespace) -> int:
    require_helm()
    from flexgen_helm.evaluation.suites_command import run_suites

    return run_suites(args, _say)


def _fidelity(args: argparse.Namespace, load_engine: EngineLoader) -> int:
    from flexgen_helm.fidelity.command import fidelity
    from flexgen_helm.fidelity.comparison import to_json
    from flexgen_helm.fidelity.table import lines

    if args.text is None and args.jobs is None:
        from flexgen_helm.assets.helm_data import speech_file

        args.text = speech_file()
    kept = fidelity(args, load_engine, _say)
    if args.json:
        print(json.dumps(to_json(kept)))
    else:
        print("\n".join([*lines(kept.result), f"result: {kept.json}", *([f"plot: {kept.png}"] if kept.png else [])]))
    return 0


def _bench(args: argparse.Namespace, load_engine: EngineLoader) -> int:
    from flexgen_helm.benchmark import FITTING_SECONDS, Workload, measure, measure_fitting

    length = "read only" if args.score else f"{args.gen_len} new tokens each"
    count = f"{args.num_prompts:,} of them" if args.num_prompts else f"as many as take about {FITTING_SECONDS:.0f} s here"
    _say(f"{args.model}: prompts of {args.prompt_len} tokens, {length}, {count}")
    begun = time.perf_counter()
    with load_engine(args) as engine:
        seconds = time.perf_counter() - begun
        workload = Workload(args.prompt_len, args.gen_len, args.num_prompts or 1, args.score)
        options = {"model": args.model, "load_seconds": seconds, "warm_up": args.warm_up, "trace": args.trace}
        if args.num_prompts:
            measured = measure(engine, workload, **options)
        else:
            measured = measure_fitting(engine, workload, say=_say, **options)
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
    completions = len(prompts) * args.num_completions
    _say(f"{args.model}: {len(prompts)} prompts, {completions} completions of at most {args.max_new_tokens} tokens")
    with load_engine(args) as engine:
        from flexgen_helm.runtime.trace import traced

        with traced(engine, args.trace):
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
    """Return the text of a file or of standard input unchanged, without a byte-order mark at the beginning."""
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


def _workload(args: argparse.Namespace) -> Workload | None:
    """Return what a benchmark will ask; None: unknown."""
    from flexgen_helm.policy.planner.workload import Workload

    if not hasattr(args, "prompt_len"):
        return None
    gen_len = 1 if args.score else args.gen_len
    return Workload.uniform(args.num_prompts or MOST_PROMPTS, args.prompt_len, gen_len)


def _load_engine(args: argparse.Namespace) -> Engine:
    begun = time.perf_counter()
    from transformers.utils import logging

    from flexgen_helm.memory.device import resolve_device
    from flexgen_helm.policy.row_sizes import with_row_sizes
    from flexgen_helm.runtime.engine import Engine

    imported = time.perf_counter()
    logging.disable_progress_bar()
    asked = asked_policy(args) or Policy(auto=True)
    policy = with_row_sizes(asked, resolve_device(args.device), few_requests=args.few_requests)
    names = (
        "max_memory",
        "offload_folder",
        "kv_dtype",
        "order",
        "dummy_weights",
        "recheck",
        "free_shapes",
        "compile_layers",
        "compression",
        "profile",
    )
    given = {name: getattr(args, name, None) for name in names}
    options = {name: value for name, value in given.items() if value} | {"workload": _workload(args)}
    engine = Engine.from_pretrained(args.model, dtype=args.dtype, device=args.device, policy=policy, rows=args.rows, **options)
    if args.verbose:
        _say(f"{args.model}: {imported - begun:.1f} s of imports, {time.perf_counter() - imported:.1f} s of loading")
    return engine


if __name__ == "__main__":
    sys.exit(main())

"""Models that fit into memory: the engine against other ways to run them on this CPU, SmolLM2-135M, HELM's own prompts.

a: 5-shot MMLU anatomy, 100 questions, one new token with 5 candidates.
b: 64 prompts of synthetic reasoning, 50 new tokens each (no end token).

The contenders are the engine with and without compiled layers, transformers one prompt at a time, its ``generate_batch``, the
Hugging Face backend of lm-eval, and vLLM. Each is a process of its own with the same threads; seconds are those of the work
without loading. Answers are compared with those of transformers, one prompt at a time in float32.
Cost of one repetition of all four cells on one core of a server CPU: about 50 minutes; 3 GiB of memory.

Command: ``python -m flexgen_helm.runs.resident_benchmark --vllm PYTHON --lm-eval PYTHON --json result.json``
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.agreement import Prompts, compare
from flexgen_helm.runs.command_line import add_json, make_parser, prepare_libraries, reports_errors, write_json
from flexgen_helm.runs.cpu_benchmark.__main__ import NUM_NEW_TOKENS, PARTS
from flexgen_helm.runs.cpu_benchmark.contenders import NUM_CANDIDATES, copy_without_end_tokens
from flexgen_helm.runs.cpu_benchmark.prompts import helm_prompts
from flexgen_helm.runs.resident_benchmark.contenders import NAMES, Measured, Task, gaps, interpreters, run
from flexgen_helm.runs.resident_benchmark.report import Entries, Entry, as_dict, render

DTYPES = ("float32", "bfloat16")
REFERENCE = "transformers"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("resident_benchmark", __doc__)
    parser.add_argument("--parts", nargs="+", choices=sorted(PARTS), default=sorted(PARTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--threads", type=int, default=1, help="threads of every contender (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of every contender; the median counts")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, help="only these (default: all that are installed)")
    parser.add_argument("--lm-eval", type=Path, metavar="PYTHON", help="an interpreter that has lm-eval (default: this one)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="an interpreter that has vLLM (default: this one)")
    add_json(parser)
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> dict[str, str]:
    """Return the interpreter of each contender that was asked for; print which ones are left out.

    Raises:
        FlexGenError: If one that the user named is not installed.
    """
    found = interpreters({"lm_eval": options.lm_eval, "vllm": options.vllm})
    for name in options.contenders or NAMES:
        if name not in found:
            remedy = f"{name} is not installed here. Name an interpreter that has it with --{name.replace('_', '-')}"
            if options.contenders:
                raise FlexGenError(f"{remedy}, or leave it out.")
            print(f"{remedy}; it is left out.", flush=True)
    return {name: found[name] for name in options.contenders or NAMES if name in found}


def make_task(part: str, options: argparse.Namespace, model: Path, folder: Path) -> Task:
    """Make the work of a part.

    Args:
        part: A key of `PARTS`.
        options: The command line.
        model: The model folder whose tokenizer HELM uses.
        folder: The same model without an end token.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = helm_prompts(PARTS[part].run_entry, model, PARTS[part].num_instances)
    new, candidates = (1, NUM_CANDIDATES) if PARTS[part].shares_all else (NUM_NEW_TOKENS, 0)
    prompts = [tokenizer.encode(text) for text in texts]
    return Task(
        title=PARTS[part].title,
        folder=str(folder),
        dtype="float32",
        texts=texts,
        prompts=prompts,
        new_tokens=new,
        candidates=candidates,
        threads=options.threads,
        repeats=options.repeats,
    )


def run_part(task: Task, options: argparse.Namespace, contenders: dict[str, str], scratch: Path) -> dict[str, Entries]:
    """Measure all contenders in all dtypes; print each dtype as it ends.

    Raises:
        FlexGenError: If the reference fails.
    """
    shown = REFERENCE in contenders and "float32" in options.dtypes
    reference = run(REFERENCE, sys.executable, task if shown else replace(task, repeats=1), scratch)
    if isinstance(reference, str):
        raise FlexGenError(f"The reference, transformers in float32, failed: {reference}")
    results = dict[str, Entries]()
    for dtype in options.dtypes:
        found = dict[str, Measured | str]()
        for name, interpreter in contenders.items():
            print(f"{task.title}, {dtype}: {name}", file=sys.stderr, flush=True)
            known = (name, dtype) == (REFERENCE, "float32")
            found[name] = reference if known else run(name, interpreter, replace(task, dtype=dtype), scratch)
        results[dtype] = judged(task, reference.tokens, found)
        title = f"{task.title}, {dtype}: {len(task.prompts)} prompts, {sum(map(len, task.prompts))} prompt tokens"
        print("\n".join(render(title, results[dtype])), flush=True)
    return results


def judged(task: Task, reference: Prompts, found: Mapping[str, Measured | str]) -> Entries:
    """Compare the answers of contenders with the reference; the gaps between its best tokens are computed where one differs."""
    measured = {name: one for name, one in found.items() if isinstance(one, Measured)}
    differing = [i for i, tokens in enumerate(reference) if any(one.tokens[i] != tokens for one in measured.values())]
    computed = gaps(task.folder, [task.prompts[i] for i in differing], [reference[i] for i in differing])
    margins = [[math.inf] * len(tokens) for tokens in reference]
    for i, gap in zip(differing, computed, strict=True):
        margins[i] = gap
    compared = {name: Entry(one, compare(one.tokens, reference, margins)) for name, one in measured.items()}
    return {name: compared.get(name, one) for name, one in found.items()}


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    options = parse()
    contenders = chosen(options)
    prepare_libraries(options.threads)
    model, results = smollm2_folder(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy_without_end_tokens(model, Path(scratch) / model.name)
        for part in options.parts:
            found = run_part(make_task(part, options, model, folder), options, contenders, Path(scratch))
            results[part] = {dtype: as_dict(entries) for dtype, entries in found.items()}
            write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The engine as a model of lm-eval and of Inspect, against their own Hugging Face backends: SmolLM2-135M, 5-shot MMLU.

lm-eval scores the four choices of each question; Inspect asks for the next token of the same prompts. A backend is a
process of its own with the same threads; seconds are those of the evaluation, the harness's own work included, without loading.
The Hugging Face backends run at the best of several batch sizes, found on the first questions.
Cost on one core of a server CPU: about 15 minutes a harness with 64 questions and 3 repetitions; 4 GiB of memory.

Command: ``python -m flexgen_helm.runs.harness_benchmark --lm-eval PYTHON --inspect PYTHON --json result.json``
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.command_line import add_json, add_model, make_parser, reports_errors, write_json
from flexgen_helm.runs.harness_benchmark.questions import write_questions
from flexgen_helm.runs.harness_benchmark.report import OURS, THEIRS, Measured, as_dict, render
from flexgen_helm.runs.memory_limit.cgroup import run_free

HARNESSES = {"lm_eval": "lm_eval", "inspect": "inspect_ai"}
"""The package of each harness."""
SHOWN_LINES = 3
"""Last lines of a failed backend's log that the result has."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("harness_benchmark", __doc__)
    add_model(parser)
    parser.add_argument("--subject", default="anatomy", help="subject of MMLU (%(default)s)")
    parser.add_argument("--questions", type=int, default=64, metavar="N", help="most questions (%(default)s)")
    sample = "questions with which the best batch size is found (%(default)s)"
    parser.add_argument("--sample", type=int, default=16, metavar="N", help=sample)
    parser.add_argument("--threads", type=int, default=1, help="threads of every backend (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of every backend; the median counts")
    for name in HARNESSES:
        text = f"an interpreter that has {name.replace('_', '-')} and this package (default: this one)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="PYTHON", help=text)
    add_json(parser)
    return parser.parse_args(arguments)


def interpreters(options: argparse.Namespace) -> dict[str, str]:
    """Return the interpreter of each harness that can run here; print which ones are left out.

    Raises:
        FlexGenError: If there is none.
    """
    found = dict[str, str]()
    for name, package in HARNESSES.items():
        named: Path | None = getattr(options, name)
        if named is not None or importlib.util.find_spec(package) is not None:
            found[name] = str(named or sys.executable)
        else:
            option = f"--{name.replace('_', '-')}"
            print(f"{package} is not installed here and is left out. Name an interpreter that has it: {option}", flush=True)
    if not found:
        raise FlexGenError("No harness is left. `make test-harnesses` builds environments that have them.")
    return found


def run(harness: str, backend: str, interpreter: str, task: dict[str, Any]) -> Measured | str:
    """Measure a backend of a harness.

    Returns:
        What was measured, or the end of its log if it failed.
    """
    scratch = Path(task["scratch"])
    given, result, log = (scratch / f"{harness}-{backend}.{kind}" for kind in ("task", "result", "log"))
    given.write_text(json.dumps(task), encoding="utf-8")
    module = "flexgen_helm.runs.harness_benchmark.sides.measure"
    command = [interpreter, "-m", module, harness, backend, str(given), str(result)]
    variables = {
        "OMP_NUM_THREADS": str(task["threads"]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    ended = run_free(command, log, variables)
    if ended.status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"status {ended.status}: " + " | ".join(line.strip() for line in lines[-SHOWN_LINES:])
    return Measured(**json.loads(result.read_text(encoding="utf-8")))


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    options, results = parse(), dict[str, Any]()
    chosen = interpreters(options)
    with tempfile.TemporaryDirectory() as scratch:
        questions = Path(scratch) / "questions.jsonl"
        task: dict[str, Any] = {
            "folder": str(options.model or smollm2_folder()),
            "questions": str(questions),
            "scratch": scratch,
            "count": write_questions(questions, options.subject, options.questions),
            "sample": options.sample,
            "threads": options.threads,
            "repeats": options.repeats,
        }
        for harness, interpreter in chosen.items():
            entries = {backend: run(harness, backend, interpreter, task) for backend in (OURS, THEIRS)}
            title = f"{harness}: {task['count']} questions of {options.subject}, 5-shot, {options.threads} threads"
            print("\n".join(render(title, entries)), flush=True)
            results[harness] = as_dict(entries)
            write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())

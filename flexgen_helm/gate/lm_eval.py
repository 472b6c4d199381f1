"""Reader of the files that lm-eval writes with ``--log_samples``: one a task, one line a sample.

Three forms are read. The first versions of 0.4 wrote a JSON list with ``arguments`` as lists, to a file named by the model.
Later ones write lines whose ``resps`` hold texts and whose ``arguments`` are mappings (``gen_args_0``, ``arg_0``). The latest
also name ``filter`` and ``metrics``. Only prompts and choices are compared between two runs, not settings of generation, whose
names have changed. Tokens are not counted in these files, so log-probabilities are those of whole answers.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.gate.config import LmEvalChoice
from flexgen_helm.reports.answers import REQUEST_COLUMNS, ROW_COLUMNS, Answers, RunFacts
from flexgen_helm.reports.reading import Key

NAME = re.compile(r"samples_(?P<task>.+?)(_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl")
PREFERRED = ("exact_match", "acc", "acc_norm")
OTHERS = (
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash"),
)
"""Fields of a sample that are no metrics."""
UNNAMED = "task"
"""Name of a task of which the file's name says the model too, and so differs between two models."""
INVALID = "[invalid]"
"""What lm-eval's filters write where they find no answer."""
NO_COUNT = "lm-eval's samples do not say how many tokens were generated"
Sample = Mapping[str, Any]


def sample_files(path: Path) -> list[Path]:
    """Return the files of samples at a path: itself, or those in a folder and the folders in it; none if there are none."""
    if path.is_file():
        return [path] if path.suffix == ".jsonl" else []
    return sorted({*path.glob("samples_*.jsonl"), *path.glob("*/samples_*.jsonl")})


@dataclass(frozen=True)
class _Task:
    name: str
    samples: Sequence[Sample]
    metric: str


def read_samples(path: Path, choice: LmEvalChoice) -> Answers:
    """Read what lm-eval logged of one model.

    Args:
        path: A file of samples, or a folder that holds some.
        choice: Metric and filter where there are several.

    Raises:
        CorruptFile: A file is torn, or not what lm-eval writes.
        FlexGenError: Two files are of one task, the folder holds several models, or there is no such metric or filter.
    """
    files = sample_files(path)
    if len({file.parent for file in files}) > 1:
        listed = ", ".join(sorted({str(file.parent) for file in files}))
        raise FlexGenError(f"{path} holds samples of several models: {listed}. Name one of these folders.")
    tasks: dict[str, _Task] = {}
    for file in files:
        task = _read_task(file, choice)
        if task.name in tasks:
            raise FlexGenError(f"{file.parent} holds two files of the task {task.name}. Remove one, or name one file.")
        tasks[task.name] = task
    rows, requests = [], []
    for task in tasks.values():
        for row, asked in _rows(task):
            rows.append(row)
            requests.extend(asked)
    folder = path if path.is_dir() else path.parent
    return Answers(
        name=folder.resolve().name,
        deployment=str(path),
        runs={task.name: _facts(task) for task in tasks.values()},
        rows=pd.DataFrame(rows, columns=list(ROW_COLUMNS)),
        requests=pd.DataFrame(requests, columns=list(REQUEST_COLUMNS)),
        texts=lambda task: _texts(tasks[task]),
    )


def _read_task(file: Path, choice: LmEvalChoice) -> _Task:
    samples = list(_parse(file))
    if not samples:
        raise CorruptFile(f"{file} holds no samples. Run lm-eval again with --log_samples.")
    match = NAME.fullmatch(file.name)
    filters = list(dict.fromkeys(str(sample.get("filter", "")) for sample in samples))
    if choice.filter is not None and choice.filter not in filters and filters != [""]:
        raise FlexGenError(f"{file} has no filter `{choice.filter}`; it has {', '.join(filters)}. Correct `lm_eval.filter`.")
    chosen = choice.filter if choice.filter in filters else filters[0]
    kept: dict[str, Sample] = {}
    for sample in samples:
        if sample.get("filter", "") == chosen:
            # Versions that name no filter write a document once for each; the first one is kept.
            kept.setdefault(str(sample["doc_id"]), sample)
    found = list(kept.values())
    return _Task(match["task"] if match else UNNAMED, found, _metric(file, found, choice))


def _parse(file: Path) -> Iterator[Sample]:
    advice = "Copy the file again, or run lm-eval again with --log_samples."
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"{file} cannot be read ({error}). {advice}") from error
    as_list = text.lstrip().startswith("[")
    for number, line in enumerate([text] if as_list else text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            for sample in content if as_list else [content]:
                _check(sample)
                yield sample
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            where = f"line {number} is" if not as_list else "it is"
            what = f"{where} no sample ({type(error).__name__}: {' '.join(str(error).split())})"
            raise CorruptFile(f"{file} is not what lm-eval writes: {what}. {advice}") from error


def _check(sample: Any) -> None:
    """Raise what `_parse` turns into an error if a sample lacks what is read of it."""
    if not isinstance(sample, dict):
        raise TypeError(f"a sample is {type(sample).__name__}")
    sample["doc_id"], sample["target"]
    if not _arguments(sample) or len(_responses(sample)) != len(_arguments(sample)):
        raise ValueError("arguments and resps do not fit")
    for response in _responses(sample):
        _logprob(response)


def _arguments(sample: Sample) -> list[list[Any]]:
    """Return the arguments of each request, whatever the version."""
    arguments = sample["arguments"]
    each = list(arguments.values()) if isinstance(arguments, dict) else list(arguments)
    return [list(one.values()) if isinstance(one, dict) else list(one) for one in each]


def _responses(sample: Sample) -> list[Any]:
    """Return the first response to each request: a text, a number, or a number and whether it is the greedy answer."""
    return [one[0] for one in sample["resps"]]


def _logprob(response: Any) -> float | None:
    """Return the log-probability of a scored text; None for a generated one."""
    if isinstance(response, list):
        return float(response[0])
    return None if isinstance(response, str) else float(response)


def _metric(file: Path, samples: Sequence[Sample], choice: LmEvalChoice) -> str:
    first = samples[0]
    names = first.get("metrics") or [name for name in first if name not in OTHERS]
    found = [name for name in names if isinstance(first.get(name), int | float)]
    if choice.metric is not None and choice.metric not in found:
        listed = ", ".join(found) or "no metric of single samples"
        raise FlexGenError(f"{file} has no metric `{choice.metric}`; it has {listed}. Correct `lm_eval.metric`.")
    known = [name for name in PREFERRED if name in found]
    return choice.metric or next(iter([*known, *found]), "")


def _rows(task: _Task) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    for sample in task.samples:
        key = {"scenario": task.name, "instance": str(sample["doc_id"]), "perturbation": "", "trial": 0, "part": 0}
        requests = [{**key, **asked} for asked in _requests(sample)]
        prompt = _digest([request["prompt"] for request in requests])
        yield {**key, **_row(task, sample, requests), "prompt": prompt, "counts": True, "cluster": f"{task.name} 0"}, requests


def _requests(sample: Sample) -> Iterator[dict[str, Any]]:
    arguments, responses = _arguments(sample), _responses(sample)
    for number, (asked, response) in enumerate(zip(arguments, responses, strict=True)):
        logprob = _scored(asked, response)
        yield {
            "mode": "",
            "reference": number if len(arguments) > 1 else -1,
            "logprob": math.nan if logprob is None else logprob,
            "text": response if logprob is None else "",
            "prompt": _digest([one for one in asked if isinstance(one, str)]),
            "length": 0 if logprob is None else 1,
            "returned": _digest(response),
        }


def _scored(asked: Sequence[Any], response: Any) -> float | None:
    logprob = _logprob(response)
    # Of a whole text there is a number alone, which newer versions write as text; a request to generate has settings.
    if logprob is None and not any(isinstance(one, dict) for one in asked):
        try:
            return float(response)
        except ValueError:
            return None
    return logprob


def _row(task: _Task, sample: Sample, requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    score = sample.get(task.metric)
    scored = [request["logprob"] for request in requests]
    generated = bool(requests[0]["text"]) or math.isnan(scored[0])
    right = _right(sample, len(requests))
    best = max(range(len(scored)), key=lambda number: scored[number])
    filtered = sample.get("filtered_resps") or [""]
    answer = str(filtered[0]) if generated else str(_arguments(sample)[best][-1])
    return {
        "split": "test",
        "score": float(score) if isinstance(score, int | float) else math.nan,
        "logprob": math.nan if right is None else scored[right],
        "answer": answer,
        "answer_logprob": scored[best],
        "tokens": math.nan,
        "parsable": float(bool(answer.strip()) and answer != INVALID) if generated else math.nan,
        "correct": str(sample["target"]),
        "length": int(right is not None and not math.isnan(scored[right])),
    }


def _right(sample: Sample, num: int) -> int | None:
    """Return the number of the request that scores the right answer; None where the sample does not say."""
    if num == 1:
        return 0
    target = sample["target"]
    try:
        index = ast.literal_eval(target) if isinstance(target, str) else target
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return index if type(index) is int and 0 <= index < num else None


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _facts(task: _Task) -> RunFacts:
    score = f"the samples of {task.name} have no metric of single samples"
    reasons = {
        "score": score,
        "logprob": "lm-eval does not score the right answer of a generated text",
        "tokens": NO_COUNT,
        "parsable": "nothing is generated: choices are scored",
    }
    return RunFacts(task.name, task.name, task.metric, False, None, None, reasons)


def _texts(task: _Task) -> dict[Any, list[Mapping[str, Any]]]:
    return {
        Key(str(sample["doc_id"]), "", 0, 0): [
            {"prompt": "".join(one for one in asked if isinstance(one, str))} for asked in _arguments(sample)
        ]
        for sample in task.samples
    }

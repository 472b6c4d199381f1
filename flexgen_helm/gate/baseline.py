"""A baseline as a file that is small enough to commit: scores, log-probabilities and digests of every answer.

Texts of prompts and answers are not kept, only digests of 64 bits. Log-probabilities are rounded to a millionth of a nat;
whether bits are equal is decided by the digest of everything that was returned. One instance takes one line, so that a change
of the file can be read.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from flexgen_helm.errors import CorruptFile, FlexGenError
from flexgen_helm.reports.answers import KEY_COLUMNS, REQUEST_COLUMNS, ROW_COLUMNS, Answers, RunFacts
from flexgen_helm.reports.engine_record import EngineRecord, Throughput

FORMAT, VERSION = "flexgen-helm baseline", 1
CHECKSUM = "checksum"
DECIMALS = 6
OF_ROW = (
    *("instance", "perturbation", "trial", "part", "split", "score", "logprob", "length"),
    *("answer", "answer_logprob", "tokens", "parsable", "counts", "prompt"),
)
OF_REQUEST = ("mode", "reference", "logprob", "length", "text", "prompt", "returned")
ROUNDED = ("logprob", "answer_logprob")
WHOLE = ("trial", "part", "length", "reference")
NUMBERS = ("score", "logprob", "answer_logprob", "tokens", "parsable")
Plain = dict[str, Any]


def write_baseline(file: Path, answers: Answers, *, date: str) -> None:
    """Write a baseline file, or nothing.

    Args:
        file: Replaced if it exists.
        answers: `flexgen_helm.gate.evidence.digested`.
        date: When, in ISO format.

    Raises:
        FlexGenError: The file cannot be written.
    """
    beside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(to_text(answers, date=date), encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise FlexGenError(f"The baseline cannot be written to {file} ({error.strerror}). Give another --record.") from error


def to_text(answers: Answers, *, date: str) -> str:
    """Return the text of a baseline file; see `write_baseline`."""
    engines: list[EngineRecord] = []
    for facts in answers.runs.values():
        if facts.engine is not None and facts.engine not in engines:
            engines.append(facts.engine)
    head = {"format": FORMAT, "version": VERSION, "date": date, "name": answers.name, "deployment": answers.deployment}
    lines = [f'"{key}": {_dump(value)}' for key, value in head.items()]
    lines.append(f'"engines": {_list([_dump(asdict(engine)) for engine in engines])}')
    lines.append(f'"runs": {_list([_run(answers, facts, engines) for facts in answers.runs.values()])}')
    return _sealed("{" + ",\n".join(lines) + "}\n")


def _sealed(text: str) -> str:
    """Return the text with a checksum of its content in the last line: a changed digit would change a verdict."""
    return text.removesuffix("}\n") + f',\n"{CHECKSUM}": "{_checksum(json.loads(text))}"}}\n'


def _checksum(content: Mapping[str, Any]) -> str:
    """Return the checksum of parsed JSON, however it was laid out."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _run(answers: Answers, facts: RunFacts, engines: Sequence[EngineRecord]) -> str:
    content = asdict(facts) | {"engine": None if facts.engine is None else engines.index(facts.engine)}
    rows = answers.rows[answers.rows["scenario"] == facts.scenario]
    requests = answers.requests[answers.requests["scenario"] == facts.scenario]
    grouped = dict(list(requests.groupby(list(KEY_COLUMNS), sort=False)))
    lines = []
    for row in rows.to_dict("records"):
        found = grouped.get(tuple(row[name] for name in KEY_COLUMNS), requests[:0]).to_dict("records")
        asked = [[_plain(name, request[name]) for name in OF_REQUEST] for request in found]
        lines.append(_dump([[_plain(name, row[name]) for name in OF_ROW], asked]))
    parts = [f'"{key}": {_dump(value)}' for key, value in content.items()]
    return "{" + ", ".join(parts) + f', "rows": {_list(lines)}' + "}"


def _plain(name: str, value: Any) -> Any:
    if name in NUMBERS:
        number = float(value)
        if not math.isfinite(number):
            return None
        return round(number, DECIMALS) if name in ROUNDED else number
    return int(value) if name in WHOLE else bool(value) if name == "counts" else str(value)


def _list(lines: Sequence[str]) -> str:
    return "[\n" + ",\n".join(lines) + "\n]"


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def read_baseline(file: Path) -> Answers:
    """Read a baseline file.

    Raises:
        CorruptFile: The file is torn, no baseline file, or one of another version.
    """
    advice = "Record it again with `flexgen-helm check --record`, or restore the file."
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptFile(f"{file} cannot be read as a baseline file ({' '.join(str(error).split())}). {advice}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CorruptFile(f"{file} is no baseline file: it does not say `{FORMAT}`. {advice}")
    if content.get("version") != VERSION:
        raise CorruptFile(
            f"{file} has version {content.get('version')!r} of the format; this package reads {VERSION}. {advice}"
        )
    # One without a checksum was recorded by an earlier version.
    if content.pop(CHECKSUM, None) not in (None, _checksum(content)):
        raise CorruptFile(f"{file} was changed since it was recorded: its checksum differs. {advice}")
    try:
        return _answers(content)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptFile(f"{file} is damaged ({type(error).__name__}: {error}). {advice}") from error


def _answers(content: Plain) -> Answers:
    engines = [_engine(engine) for engine in content["engines"]]
    runs: dict[str, RunFacts] = {}
    rows: list[Plain] = []
    requests: list[Plain] = []
    for run in content["runs"]:
        facts = _facts(run, engines)
        runs[facts.scenario] = facts
        for row, asked in run["rows"]:
            named = {"scenario": facts.scenario, **_named(OF_ROW, row), "correct": ""}
            named["cluster"] = f"{facts.scenario} {named['trial']}"
            rows.append(named)
            requests.extend(_requests(named, asked))
    if not rows:
        raise ValueError("it holds no answers")
    return Answers(
        name=str(content["name"]),
        deployment=str(content["deployment"]),
        runs=runs,
        rows=pd.DataFrame(rows, columns=list(ROW_COLUMNS)),
        requests=pd.DataFrame(requests, columns=list(REQUEST_COLUMNS)),
        texts=lambda _: {},
    )


def _requests(row: Mapping[str, Any], asked: Sequence[Sequence[Any]]) -> Iterator[Plain]:
    for request in asked:
        yield {**{name: row[name] for name in KEY_COLUMNS}, **_named(OF_REQUEST, request)}


def _named(names: Sequence[str], values: Sequence[Any]) -> Plain:
    return {name: _read(name, value) for name, value in zip(names, values, strict=True)}


def _read(name: str, value: Any) -> Any:
    if name in NUMBERS:
        return math.nan if value is None else float(value)
    kind = int if name in WHOLE else bool if name == "counts" else str
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r:.40}")
    return value


def _facts(run: Plain, engines: Sequence[EngineRecord]) -> RunFacts:
    names = ("scenario", "group", "metric", "lower_is_better", "score", "reasons")
    engine = None if run["engine"] is None else engines[run["engine"]]
    return RunFacts(engine=engine, **{name: run[name] for name in names})


def _engine(plain: Plain) -> EngineRecord:
    measured = plain["throughput"]
    return EngineRecord(**{**plain, "throughput": None if measured is None else Throughput(**measured)})

"""Runs the survey: ``python -m tests.survey [type ...]``."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.survey import table
from tests.survey.judge import Verdict, judge
from tests.survey.processes import judge_all
from tests.survey.variants import VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def all_names() -> list[str]:
    """Returns every type of the library's causal-LM mapping and every variant, in the order of the table."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS], key=table.key)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the survey; returns 1 if any model was wrong or crashed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    known = all_names()
    for name in options.types:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            parser.error(f"there is no type or variant {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    if options.list:
        print("\n".join(known))
        return 0
    verdicts = []
    work = functools.partial(judge, rows=options.rows)
    for verdict in judge_all(options.types or known, jobs=options.jobs, timeout=options.timeout, work=work):
        verdicts.append(verdict)
        print(_line(verdict, len(verdicts), len(options.types or known)), flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in Counter(v.outcome for v in verdicts).most_common()))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    page = options.output or (None if options.types or options.rows != "auto" else PAGE)
    if page:
        page.write_text(table.render(verdicts))
    return int(any(verdict.outcome in ("wrong", "crashed") for verdict in verdicts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.survey", description="Survey the causal language models.")
    parser.add_argument("types", nargs="*", metavar="type", help="types or variants; none: all")
    parser.add_argument("--list", action="store_true", help="print the names of types and variants")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one model (default: %(default)s)")
    parser.add_argument("--rows", choices=("auto", "packed", "single"), default="auto", help="kind of rows to force")
    parser.add_argument("--output", type=Path, help="page to write (default: docs/models.md, if all were run)")
    parser.add_argument("--json", type=Path, help="file for the verdicts")
    return parser


def _line(verdict: Verdict, number: int, total: int) -> str:
    worst = f" {verdict.worst_token:.1e} {verdict.worst_prompt:.1e}" if verdict.tokens else ""
    return f"[{number}/{total}] {verdict.name}: {verdict.outcome}{worst} ({verdict.seconds:.1f} s) {verdict.remark}".rstrip()


if __name__ == "__main__":
    sys.exit(main())

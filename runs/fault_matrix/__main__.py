"""Faults in numbers: hostile requests, kills, damaged files, full disks, two commands at once, the clock set back.

Each fault must end in a right answer, in a refusal by name, or in work that is done again. The exit status is 0 if none was
lost, hung, showed a traceback or was answered wrong. What is done is kept in a folder; a rerun goes on where it stopped.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from flexgen_helm.cache_folder import cache_folder
from flexgen_helm.runs.command_line import add_json, exit_on_sigterm, make_parser, reports_errors, write_json
from flexgen_helm.runs.fault_matrix import cases, table
from flexgen_helm.runs.fault_matrix.outcomes import FAILURES, Case, Ledger, Outcome
from flexgen_helm.runs.fault_matrix.worker import Worker, make


@dataclass(frozen=True)
class Kind:
    """A part of the matrix."""

    maker: str
    """Module and class, which is imported in a process of its own."""
    folder: str
    """Of that process, which parts of one maker share."""
    cases: Callable[[int], list[Case]]
    short: int
    """Faults of the short form."""
    full: int


KINDS: dict[str, Kind] = {
    "requests": Kind("requests.part:RequestsPart", "requests", cases.requests, 300, 10_000),
    "kills": Kind("processes.part:ProcessesPart", "processes", cases.kills, 3, 100),
    "files": Kind("files.part:FilesPart", "files", cases.files, 20, 500),
    "disks": Kind("processes.part:ProcessesPart", "processes", cases.disks, 2, 10),
    "twins": Kind("processes.part:ProcessesPart", "processes", cases.twins, 2, 10),
    "clock": Kind("processes.part:ProcessesPart", "processes", cases.clock, 2, 10),
}


@reports_errors
def main() -> int:
    """Run what is missing of the matrix, print its table, and return the exit status."""
    parser = make_parser("fault_matrix", __doc__)
    parser.add_argument("--parts", nargs="+", choices=list(KINDS), default=list(KINDS), help="default: all")
    parser.add_argument("--scale", choices=("short", "full"), default="full", help="how many faults of each part")
    for name, kind in KINDS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"how many instead ({kind.short} or {kind.full:,})")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="what is done (default: fault_matrix in the cache folder)")
    parser.add_argument("--anew", action="store_true", help="forget what is done")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table there")
    add_json(parser)
    options = parser.parse_args()
    exit_on_sigterm()
    state: Path = (options.state or cache_folder() / "fault_matrix").absolute()
    if options.anew:
        shutil.rmtree(state, ignore_errors=True)
    ledger, found = Ledger(state / "outcomes.jsonl"), dict[str, list[Outcome]]()
    folders = {kind.folder: kind.maker for kind in KINDS.values()}
    workers = {name: Worker(partial(make, maker), state / name, state / f"{name}.log") for name, maker in folders.items()}
    try:
        for name in options.parts:
            kind, given = KINDS[name], getattr(options, name)
            count = given if given is not None else getattr(kind, options.scale)
            found[name] = _run(name, kind.cases(count), ledger, workers[kind.folder])
    finally:
        for worker in workers.values():
            worker.close()
    text = table.as_markdown(found)
    print(f"{text}\n\n" + "\n".join(table.failures(found)))
    write_json(options.json, table.as_json(found))
    if options.markdown is not None:
        options.markdown.write_text(f"{text}\n", encoding="utf-8")
    return int(any(each.verdict in FAILURES for outcomes in found.values() for each in outcomes))


def _run(name: str, tried: list[Case], ledger: Ledger, worker: Worker) -> list[Outcome]:
    """Run the cases of a part that have not been tried, and return the outcomes of all."""
    for case in tqdm([case for case in tried if not ledger.has(name, case)], desc=name, disable=None):
        ledger.add(name, case, worker.run(case))
    outcomes: list[Outcome] = ledger.of(name, tried)
    return outcomes


if __name__ == "__main__":
    sys.exit(main())

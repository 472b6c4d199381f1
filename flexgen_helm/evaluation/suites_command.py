"""The command `flexgen-helm suites`: what suites there are, what they ask of a model, how long that takes."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flexgen_helm.errors import FlexGenError
from flexgen_helm.evaluation.suites import Suite, find_suite, packaged_suites
from flexgen_helm.evaluation.table import align

if TYPE_CHECKING:
    from flexgen_helm.evaluation.size import Size, SuiteSize

HEADER = ("requests", "prompt tokens", "computed", "new tokens", "hours")


def run_suites(args: Namespace, say: Callable[[str], None]) -> int:
    """List suites, or the run entries of one.

    Args:
        args: Options of the command.
        say: Told what happens, a line at a time.

    Raises:
        FlexGenError: There is no such suite or model, or the size of the one suite that was named is not known.
    """
    suites = [find_suite(args.suite)] if args.suite else list(packaged_suites().values())
    if args.model is None:
        listed: list[dict[str, Any]] = [_plain(suite) for suite in suites]
        lines = _names(suites, detailed=bool(args.suite))
    else:
        sizes = {suite: _measured(suite, args, say) for suite in suites}
        listed = [_plain(suite) | _plain_size(size) for suite, size in sizes.items()]
        lines = _entries(suites[0], *sizes.values()) if args.suite else _totals(sizes.items())
    print(json.dumps(listed[0] if args.suite else listed) if args.json else "\n".join(lines))
    return 0


def _measured(suite: Suite, args: Namespace, say: Callable[[str], None]) -> SuiteSize | str:
    """Return the size of a suite; where it is one of several, the reason for which it is not known."""
    from flexgen_helm.evaluation.evaluate import make_evaluation
    from flexgen_helm.evaluation.size import suite_size

    evaluation = make_evaluation(args.model, str(suite.run_entries), args.out, args.max_eval_instances)
    try:
        return suite_size(evaluation, args, say)
    except FlexGenError as error:
        if args.suite:
            raise
        return str(error)


def _names(suites: Sequence[Suite], *, detailed: bool) -> list[str]:
    rows = [(suite.name, f"{suite.num_entries}", suite.description) for suite in suites]
    lines = align([("suite", "entries", ""), *rows], left=(0, 2)).splitlines()
    entries = [f"  {entry}" for suite in suites for entry in suite.entries] if detailed else []
    return [line.rstrip() for line in lines] + entries


def _totals(sizes: Iterable[tuple[Suite, SuiteSize | str]]) -> list[str]:
    rows, notes, machines = [], [], set()
    for suite, size in sizes:
        rows.append((suite.name, f"{suite.num_entries}", *_cells(None if isinstance(size, str) else size.size)))
        if isinstance(size, str):
            notes.append(f"{suite.name}: {size}")
            continue
        machines.add(size.machine)
        missing = [entry for entry in size.entries if entry.size is None]
        if missing:
            notes.append(
                f"{suite.name} without {len(missing)} of {len(size.entries)} runs: {missing[0].run}: {missing[0].reason}"
            )
    return [*align([("suite", "entries", *HEADER), *rows], left=(0,)).splitlines(), *notes, *_where(machines)]


def _entries(suite: Suite, size: SuiteSize | str) -> list[str]:
    assert not isinstance(size, str)
    rows = [(entry.run, *_cells(entry.size)) for entry in size.entries]
    together = ("all together", *_cells(size.size))
    notes = [f"{entry.run}: {entry.reason}" for entry in size.entries if entry.reason]
    return [*align([(suite.name, *HEADER), *rows, together], left=(0,)).splitlines(), *notes, *_where({size.machine})]


def _cells(size: Size | None) -> tuple[str, ...]:
    if size is None:
        return ("-",) * len(HEADER)
    counts = (size.requests, size.prompt_tokens_asked, size.prompt_tokens_computed, size.new_tokens)
    return (*(f"{count:,}" for count in counts), f"{size.hours:.3f}")


def _where(machines: Iterable[str]) -> list[str]:
    return [f"hours: predicted for {name}, answers as long as they may be, loading not counted" for name in sorted(machines)]


def _plain(suite: Suite) -> dict[str, Any]:
    return {"name": suite.name, "description": suite.description, "file": str(suite.run_entries), "entries": suite.entries}


def _plain_size(size: SuiteSize | str) -> dict[str, Any]:
    if isinstance(size, str):
        return {"reason": size}
    plain = asdict(size)
    return {"runs": plain["entries"], "size": plain["size"], "machine": plain["machine"]}

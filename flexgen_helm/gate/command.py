"""The command `flexgen-helm check`: from its options to the exit status."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime

from flexgen_helm.errors import FlexGenError
from flexgen_helm.gate.baseline import write_baseline
from flexgen_helm.gate.checking import Check, check, record
from flexgen_helm.gate.config import read_config
from flexgen_helm.gate.output import as_json, as_junit, table, write
from flexgen_helm.gate.verdict import PASSED, status_of
from flexgen_helm.reports.comparing import Choices


def run_check(args: Namespace, say: Callable[[str], None]) -> int:
    """Check or record, write the files that were asked for, print the verdicts, and return the exit status.

    Args:
        args: Options of the command.
        say: Told what happens, a line at a time.

    Returns:
        0: every candidate passes; 1: a regression; 2: a required gate could not decide, or none vouches for the answers.

    Raises:
        FlexGenError: If something cannot be found, read, compared or written.
    """
    if not args.candidates and args.record is None:
        raise FlexGenError("There is nothing to do. Give --candidates to check them, or --record FILE to keep the baseline.")
    config = read_config(args.config)
    choices = Choices.from_options(args)
    checked = check(Check(args.baseline, args.candidates, config, choices), say=say) if args.candidates else []
    if args.record is not None:
        answers = record(args.baseline, choices, config)
        write_baseline(args.record, answers, date=datetime.now(UTC).isoformat(timespec="seconds"))
        print(f"baseline: {len(answers.rows):,} answers of {answers.name} in {args.record}")
    if not args.candidates:
        return PASSED
    for file, text, option in ((args.junit, as_junit, "--junit"), (args.json, as_json, "--json")):
        if file is not None:
            write(file, text(checked), option)
    print("\n".join(table(checked)))
    return status_of(checked)

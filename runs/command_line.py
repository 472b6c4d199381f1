"""Options, results and errors that the command lines of the runs have in common."""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from flexgen_helm.errors import FlexGenError
from flexgen_helm.runs.memory_limit.cgroup import NotPermitted
from flexgen_helm.runs.memory_limit.process import NOT_PERMITTED


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a run's docstring: its first paragraph above the options, the others below.

    Args:
        name: Name of the run's folder.
        doc: The docstring of its ``__main__``.
    """
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m flexgen_helm.runs.{name}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser, option: str = "--model") -> None:
    """Add an option for a model folder, which is None where it is not given."""
    parser.add_argument(option, type=Path, metavar="FOLDER", help="a model folder (default: SmolLM2-135M-Instruct)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, for `write_json`."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")


def write_json(file: Path | None, result: object) -> None:
    """Write a result, if ``--json`` was given."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2), encoding="utf-8")


def prepare_libraries(threads: int) -> None:
    """Let torch compute with a number of threads, and let transformers load without progress bars."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(threads)
    disable_progress_bar()


def exit_on_sigterm() -> None:
    """Let SIGTERM end the process as an error does, so that cgroups and temporary folders are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def reports_errors(main: Callable[[], int]) -> Callable[[], int]:
    """Make ``main`` print errors that its user can mend, and return 1, or 3 where memory cannot be limited."""

    @functools.wraps(main)
    def command() -> int:
        try:
            return main()
        except FlexGenError as error:
            print(error, file=sys.stderr)
            return NOT_PERMITTED if isinstance(error, NotPermitted) else 1

    return command

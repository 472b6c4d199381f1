"""What the command lines of the runs have in common."""

from __future__ import annotations

import argparse


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a run's docstring: its first paragraph above the options, the others below.

    Args:
        name: Of the run's folder.
        doc: The docstring of its ``__main__``.
    """
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m flexgen_helm.runs.{name}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

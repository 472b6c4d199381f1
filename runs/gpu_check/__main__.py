"""What only a GPU can tell, in nine minutes: one JSON file and one page, which grow with each part.

Exit status: 0 if all parts succeeded, 1 if one did not, 2 if torch sees no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flexgen_helm.runs.command_line import make_parser
from flexgen_helm.runs.gpu_check.parts import PARTS
from flexgen_helm.runs.gpu_check.process import run_part
from flexgen_helm.runs.gpu_check.report import succeeded, write_report

NO_GPU = 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("gpu_check", __doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), metavar="DIR", help="for the results (gpu_check)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that every part runs")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parse(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("torch sees no CUDA GPU on this machine, so there is nothing to check. Try --dry-run.", file=sys.stderr)
        return NO_GPU
    found: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        if not part.by_name if options.parts is None else part.name in options.parts:
            found[part.name] = run_part(part, dry_run=options.dry_run)
            said = found[part.name].get("error", "done" if succeeded(found[part.name]) else "failed")
            print(f"{part.name}: {said} ({found[part.name]['seconds']:.0f} s)", flush=True)
            write_report(options.out, found)
    print(f"written: {options.out / 'gpu_check.md'}")
    return 0 if all(map(succeeded, found.values())) else 1


if __name__ == "__main__":
    sys.exit(main())

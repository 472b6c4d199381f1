"""Accuracy against compression: evaluates a model and its variants, compares their predictions, and writes a report.

Run the same command again after an interruption: what is finished is not computed again. A table of HELM
(helm-server) and a report (OUT/report/report.html) show the 16-bit model and each variant side by side.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.runs.accuracy_vs_compression.steps import Study, run
from flexgen_helm.runs.accuracy_vs_compression.variants import VARIANTS
from flexgen_helm.runs.command_line import make_parser, reports_errors

INSTANCES, FIDELITY_TOKENS = 50, 8 * 511 + 1
"""By default. Eight whole windows of 512 tokens: a short last window would widen the intervals of all."""
ALL_INSTANCES, FULL_FIDELITY_TOKENS = 100_000, 23 * 511 + 1
"""With ``--full``: more instances than any split has, and most of the address."""


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    parser = make_parser("accuracy_vs_compression", __doc__)
    add = parser.add_argument
    add("--model", metavar="M", help="model folder or hub name without a variant (default: SmolLM2-135M-Instruct)")
    add("--variants", nargs="+", default=VARIANTS, metavar="V", help=f"as behind the @ (default: {' '.join(VARIANTS)})")
    size = parser.add_mutually_exclusive_group()
    drawn = "instances of each run entry, drawn at random and equal for all variants (%(default)s)"
    size.add_argument("-m", "--max-eval-instances", type=int, default=INSTANCES, metavar="N", help=drawn)
    size.add_argument("--full", action="store_true", help=f"all instances, and fidelity over {FULL_FIDELITY_TOKENS:,} tokens")
    tokens = f"tokens over which predictions are compared ({FIDELITY_TOKENS:,})"
    add("--fidelity-tokens", type=int, metavar="N", help=tokens)
    add("--out", type=Path, default=Path("accuracy_vs_compression"), metavar="DIR", help="output folder (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    study = Study(
        model=args.model or str(smollm2_folder()),
        variants=args.variants,
        instances=ALL_INSTANCES if args.full else args.max_eval_instances,
        fidelity_tokens=args.fidelity_tokens or (FULL_FIDELITY_TOKENS if args.full else FIDELITY_TOKENS),
        out=args.out,
    )
    status: int = run(study)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""The FlexGen paper's evaluation: seven sub-scenarios of HELM and data wrangling, with 16 bits and compressed.

Entries whose data are not here and cannot be downloaded fail by name; the others are evaluated and compared. What has data
written by hand is labelled in the report. Run the same command again after an interruption, or with more data in place: what
is answered is not computed again. The exit status is 1 where entries are missing.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.evaluation.commands import Evaluation
from flexgen_helm.evaluation.preparation import data_of_the_suite
from flexgen_helm.runs.accuracy_vs_compression.__main__ import FIDELITY_TOKENS
from flexgen_helm.runs.accuracy_vs_compression.steps import Study, missing_entries, run
from flexgen_helm.runs.command_line import make_parser, reports_errors

SUITE = "flexgen_paper"
VARIANTS = ("w4kv4",)
INSTANCES = 100


def hand_made(evaluation: Evaluation) -> list[str]:
    """Say which scenarios read data that were written by hand."""
    return [HAND_MADE[name] for name in data_of_the_suite(evaluation)]


HAND_MADE = {
    "wikifact": "Hand-made data: wikifact has a few facts written by hand. Its scores say nothing of WikiFact.",
    "entity_matching": "Hand-made data: entity_matching, Fodors_Zagats, has restaurants written by hand. "
    "Its scores say nothing of that data set.",
    "entity_data_imputation": "Hand-made data: entity_data_imputation, Restaurant, has restaurants written by hand. "
    "Its scores say nothing of that data set.",
}
"""What a report says of the data that come with the suite, by scenario."""


@reports_errors
def main() -> int:
    """Run the command and return its exit status."""
    parser = make_parser("flexgen_paper", __doc__)
    add = parser.add_argument
    add("--model", metavar="M", help="model folder or hub name without a variant (default: SmolLM2-135M-Instruct)")
    add("--variants", nargs="+", default=VARIANTS, metavar="V", help=f"as behind the @ (default: {' '.join(VARIANTS)})")
    add("-m", "--max-eval-instances", type=int, default=INSTANCES, metavar="N", help="of each run entry (%(default)s)")
    add("--out", type=Path, default=Path(SUITE), metavar="DIR", help="output folder (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    study = Study(
        model=args.model or str(smollm2_folder()),
        variants=args.variants,
        instances=args.max_eval_instances,
        fidelity_tokens=FIDELITY_TOKENS,
        out=args.out,
        suite=SUITE,
        partial=True,
        notes=hand_made,
    )
    status: int = run(study)
    missing = [] if status else missing_entries(study.evaluation(None))
    if missing:
        print(f"{len(missing)} run entries were left out, because their data are not here; README.md says where to put them:")
        print("\n".join(f"  {entry}" for entry in missing), flush=True)
    return status or bool(missing)


if __name__ == "__main__":
    sys.exit(main())

"""Check that placement and block sizes change no bit, on a real model through HELM: ``make gate``, ``make gate INSTANCES=50``.

SmolLM2 is evaluated twice on this machine, once as it is and once with weights on disk and small blocks, each with caches of
its own. `flexgen-helm check` then judges by `.ci/small_suite/gate.yaml`. The exit status is that of the first command that
fails; files are in ``build/gate``.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.cli import main as flexgen_helm
from flexgen_helm.evaluation.evaluate import evaluate, make_evaluation

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "gate"
SUITE = ROOT / ".ci" / "small_suite"
SIDES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "placed": {"policy": {"num_gpu_batches": 2, "block_tokens": 1024, "weights": [0.4, 0.0, 0.6]}},
}
"""Options of each evaluation. None of them is part of the numerics."""


def main() -> int:
    """Evaluate both sides, check, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--max-eval-instances", type=int, default=5, metavar="N", help="of each run entry (%(default)s)")
    instances = parser.parse_args().max_eval_instances
    model = str(smollm2_folder())
    shutil.rmtree(OUT, ignore_errors=True)
    for name, options in SIDES.items():
        evaluation = make_evaluation(model, str(SUITE), OUT / name, instances, options)
        # Its scenarios' data come with this package, as those of packaged suites do.
        packaged = replace(evaluation, suite=replace(evaluation.suite, packaged=True))
        if status := evaluate(packaged):
            return status
    before, after = (str(OUT / name / "runs" / SUITE.name) for name in SIDES)
    files = ("--config", str(SUITE / "gate.yaml"), "--junit", str(OUT / "junit.xml"))
    return flexgen_helm(["check", "--baseline", before, "--candidate", after, *files])


if __name__ == "__main__":
    sys.exit(main())

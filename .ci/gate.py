"""Check that placement and block sizes change no bit, on a real model through HELM: ``make gate``, ``make gate INSTANCES=50``.

SmolLM2 is evaluated twice on this machine, once as it is and once with weights on disk and small blocks, each with caches of
its own. `flexgen-helm check` then judges by `.ci/gate.yaml`. The exit status is that of the check; files are in ``build/gate``.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from flexgen_helm.assets import smollm2_folder

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "gate"
SUITE = "quickstart"
SIDES = {
    "plain": (),
    "placed": ("--policy", "num_gpu_batches=2,block_tokens=1024,weights=0.4:0:0.6,prefetch=1"),
}
"""Options of each evaluation. None of them is part of the numerics."""


def command(*arguments: str) -> list[str]:
    """Return a command of this package for this interpreter."""
    return [sys.executable, "-m", "flexgen_helm.cli", *arguments]


def main() -> int:
    """Evaluate both sides, check, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "-m", "--max-eval-instances", default="10", metavar="N", help="instances of each run entry (%(default)s)"
    )
    instances = parser.parse_args().max_eval_instances
    model = str(smollm2_folder())
    shutil.rmtree(OUT, ignore_errors=True)
    suites = [OUT / name / "runs" / SUITE for name in SIDES]
    for name, options in SIDES.items():
        evaluation = ("eval", "--model", model, "--suite", SUITE, "-m", instances, "--out", str(OUT / name), *options)
        subprocess.run(command(*evaluation), check=True, cwd=ROOT)
    config, junit = ROOT / ".ci" / "gate.yaml", OUT / "junit.xml"
    sides = ("--baseline", str(suites[0]), "--candidate", str(suites[1]))
    return subprocess.run(
        command("check", *sides, "--config", str(config), "--junit", str(junit)), check=False, cwd=ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())

"""A process of a pipeline with a given number of sweeps in flight, of which there are otherwise as many as stages.

Command: ``python -m flexgen_helm.runs.slow_network.rank LANES bench --model M ...``, started on every node
"""

from __future__ import annotations

import sys
from importlib import import_module

from flexgen_helm.cli import main


def run() -> int:
    """Run `flexgen-helm` with what stands behind the number."""
    lanes = int(sys.argv[1])
    stage = import_module("flexgen_helm.runtime.pipeline.stage").Stage
    stage.num_lanes = property(lambda _: lanes)
    return main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(run())

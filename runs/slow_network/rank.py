"""A process of a pipeline with a given number of sweeps in flight, which is otherwise that of its stages.

Command: ``python -m flexgen_helm.runs.slow_network.rank LANES bench --model M ...``, started on every node
"""

from __future__ import annotations

import sys

from flexgen_helm.cli import main
from flexgen_helm.runtime.pipeline.stage import Stage


def run() -> int:
    """Run `flexgen-helm` with what stands behind the number."""
    lanes = int(sys.argv[1])
    Stage.num_lanes = property(lambda _: lanes)  # type: ignore[method-assign, assignment]
    return main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(run())

"""`flexgen-helm plan --stages`: what several machines in a row are predicted to bring."""

from __future__ import annotations

import json
from argparse import Namespace

from flexgen_helm.errors import PolicyError
from flexgen_helm.policy.planner.pipeline.network import NO_NETWORK
from flexgen_helm.policy.planner.pipeline.scaling import scaling
from flexgen_helm.policy.planner.search.choose import Problem
from flexgen_helm.runtime.planning.pipeline_text import PlannedPipeline, pipeline_json, pipeline_lines

MOST_STAGES = 16
"""Most stages that `--stages auto` tries, unless the user names another number."""
OF_STAGES = {"network": "--network", "lanes": "--lanes", "most_stages": "--most-stages"}
"""Options that mean nothing without `--stages`."""
OF_ONE = {"allow": "--allow", "max_latency": "--max-latency", "min_throughput": "--min-throughput", "plot": "--plot"}
"""Options that are of one machine only."""


def check_options(args: Namespace) -> None:
    """Refuse options that would be ignored.

    Raises:
        PolicyError: If options of a pipeline are given without one, or options of one machine with one.
    """
    names = OF_STAGES if args.stages is None else OF_ONE
    given = [option for name, option in names.items() if getattr(args, name)]
    if args.stages not in (None, "auto") and args.most_stages:
        given.append("--most-stages")
    if given:
        remedy = "Add --stages N or --stages auto" if args.stages is None else f"Leave out --stages {args.stages}"
        raise PolicyError(f"{', '.join(given)} cannot be used {_with(args.stages)}. {remedy}, or leave out {', '.join(given)}.")


def _with(stages: int | str | None) -> str:
    return "without --stages" if stages is None else f"with --stages {stages}"


def run_pipeline_plan(args: Namespace, model: str, problem: Problem) -> int:
    """Print what the asked numbers of stages are predicted to bring.

    Args:
        args: Options of the command.
        model: Name of the model.
        problem: What is asked, and the machine of each stage.

    Raises:
        PolicyError: If none of them can run.
    """
    if args.stages == "auto":
        most = min(args.most_stages or MOST_STAGES, problem.shapes.num_layers)
        counts = [2**i for i in range(most.bit_length())]
    else:
        counts = [args.stages]
    network = args.network or NO_NETWORK
    planned = PlannedPipeline(model, problem, network, scaling(problem, counts, network, lanes=args.lanes))
    print(json.dumps(pipeline_json(planned)) if args.json else "\n".join(pipeline_lines(planned)))
    return 0

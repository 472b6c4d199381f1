"""Print a table: simulated pipelines of 1, 4 and 16 machines, beside Table 3 of the FlexGen paper.

Nothing is computed but predictions, from the profiles of machines that are not here. Each machine gets as many jobs.

Command: ``python -m flexgen_helm.runs.scale_out --models opt-30b --stages 1 4 16``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from flexgen_helm.compression.config import resolve
from flexgen_helm.errors import FlexGenError
from flexgen_helm.machine.profile_file import named_profile
from flexgen_helm.policy.planner.pipeline.network import Network, parse_network
from flexgen_helm.policy.planner.pipeline.predict import PipelinePrediction
from flexgen_helm.policy.planner.pipeline.scaling import best_pipeline
from flexgen_helm.policy.planner.search.choice import Constraints
from flexgen_helm.policy.planner.search.choose import Problem
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.runs.command_line import add_json, make_parser, reports_errors, write_json
from flexgen_helm.runtime.planning.command import planned_shapes, space_of
from flexgen_helm.runtime.planning.sources import device_of, open_source

MODELS = ("facebook/opt-6.7b", "facebook/opt-30b", "facebook/opt-175b")
MACHINES = ("t4", "h100")
PROMPT_LEN, GEN_LEN = 512, 32
PAPER: Mapping[tuple[str, str, int], float] = {
    ("facebook/opt-6.7b", "t4", 1): 25.26,
    ("facebook/opt-6.7b", "t4", 4): 201.12,
    ("facebook/opt-30b", "t4", 1): 7.32,
    ("facebook/opt-30b", "t4", 4): 23.61,
    ("facebook/opt-175b", "t4", 1): 0.69,
    ("facebook/opt-175b", "t4", 4): 2.33,
}
"""New tokens per second of generation, prompts included (Table 3: 4 machines with a T4 each, prompts of 512 tokens, 32 new)."""
NETWORK = "10Gbit/s,0.5ms"
"""The paper does not name its network; machines of a cloud have about that."""


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        model: Name of the model.
        machine: Name of the profile.
        stages: Number of machines.
        tokens_per_second: Predicted.
        binding: What binds.
        utilisation: Share of the run in which the busiest resource of the slowest stage is busy.
        policy: Sizes of the policy.
        paper: What the paper measured; None: nothing.
        refused: Why nothing is predicted; "": it is.
    """

    model: str
    machine: str
    stages: int
    tokens_per_second: float = 0.0
    binding: str = ""
    utilisation: float = 0.0
    policy: str = ""
    paper: float | None = None
    refused: str = ""


def predict(model: str, machine: str, stages: int, network: Network, *, jobs: int, numerics: bool) -> Line:
    """Predict one line.

    Args:
        model: Name of the model; @w4kv4 and the like name variants.
        machine: Name of the profile of each machine.
        stages: Number of machines.
        network: What lies between them.
        jobs: Jobs for each machine.
        numerics: Whether row sizes and the place of attention are searched too.
    """
    profile = named_profile(machine)
    name, compression = resolve(model)
    shapes = planned_shapes(open_source(name, "auto", device_of(profile)), compression)
    workload = Workload.uniform(jobs * stages, PROMPT_LEN, GEN_LEN)
    constraints = Constraints(search_numerics=numerics)
    problem = Problem.of(shapes, workload, profile, space_of(profile, {}), constraints=constraints)
    paper = PAPER.get((model, machine, stages))
    try:
        made = best_pipeline(problem, stages, network)
    except FlexGenError as error:
        return Line(model, machine, stages, paper=paper, refused=str(error))
    used = made.utilisation[made.slowest]
    return Line(model, machine, stages, made.tokens_per_second, made.binding, used, describe(made), paper)


def describe(made: PipelinePrediction) -> str:
    """Return the sizes of a policy: sequences of a lane's block, tokens of its prompts, per cent of K and V on the device."""
    policy = made.policy
    attends = ", CPU attends" if policy.cpu_attention and policy.cache[1] else ""
    return f"{made.lanes} x {policy.block_size} sequences, K and V {100 * policy.cache[0]:.0f} % on the device{attends}"


def table(lines: list[Line]) -> list[str]:
    """Return the lines of a table in Markdown."""
    names = ["model", "machine", "GPUs", "simulated", "times one", "paper", "times one", "binds", "its busy share", "policy"]
    found = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for line in lines:
        one = next((each for each in lines if (each.model, each.machine, each.stages) == (line.model, line.machine, 1)), None)
        times = line.tokens_per_second / one.tokens_per_second if one is not None and one.tokens_per_second else None
        alone = PAPER.get((line.model, line.machine, 1))
        paper = "-" if line.paper is None else f"{line.paper:.2f}"
        of_paper = f"{line.paper / alone:.2f}" if line.paper is not None and alone else "-"
        simulated = "does not fit" if line.refused else f"{line.tokens_per_second:.2f}"
        ratio = "-" if times is None or line.refused else f"{times:.2f}"
        cells = [line.model, line.machine, str(line.stages), simulated, ratio, paper, of_paper]
        found.append("| " + " | ".join([*cells, line.binding, f"{line.utilisation:.0%}", line.policy]) + " |")
    return found


@reports_errors
def main() -> int:
    """Print the table and return the exit status."""
    parser = make_parser("scale_out", __doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="M", help="models, also variants such as @w4kv4")
    parser.add_argument("--machines", nargs="+", default=MACHINES, metavar="P", help="profiles of the machines (t4 h100)")
    parser.add_argument("--stages", nargs="+", type=int, default=(1, 4, 16), metavar="N", help="numbers of machines (1 4 16)")
    parser.add_argument("--network", type=parse_network, default=parse_network(NETWORK), help=f"between machines ({NETWORK})")
    parser.add_argument("--jobs", type=int, default=512, metavar="N", help="jobs for each machine (%(default)s)")
    parser.add_argument("--keep-numerics", action="store_true", help="keep row sizes and the place of attention of an engine")
    add_json(parser)
    options = parser.parse_args()
    lines = []
    for model in options.models:
        for machine in options.machines:
            for stages in options.stages:
                numerics = not options.keep_numerics
                line = predict(model, machine, stages, options.network, jobs=options.jobs, numerics=numerics)
                lines.append(line)
                print(line, file=sys.stderr, flush=True)
    print(f"Simulated new tokens per second; network {options.network}, {options.jobs} jobs for each machine.")
    print("\n".join(table(lines)))
    write_json(options.json, [asdict(line) for line in lines])
    return 0


if __name__ == "__main__":
    sys.exit(main())

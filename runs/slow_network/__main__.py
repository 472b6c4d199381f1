"""A pipeline over a slow network: measured throughput against the plan's, and against one batch at a time.

Each process of the pipeline is in a network namespace of its own on this machine; packets between them are delayed and limited
in rate (`relay`), as in Fig. 4 of the FlexGen paper: 10 ms and 1 Gbit/s, 100 ms and 100 Mbit/s. Root is needed (exit status 3
where that is not permitted). One batch at a time is the same pipeline with one sweep in flight.
The plan is computed from a profile of this machine with as many threads as each process has, which is measured first.

Command: ``python -m flexgen_helm.runs.slow_network --stages 2 --json result.json``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flexgen_helm.assets import smollm2_folder
from flexgen_helm.errors import FlexGenError
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.machine.profile_file import read_profile
from flexgen_helm.options import parse_policy
from flexgen_helm.policy.planner.pipeline.divided import Stages
from flexgen_helm.policy.planner.pipeline.network import Network, parse_network
from flexgen_helm.policy.planner.pipeline.predict import PipelinePrediction, simulate_pipeline
from flexgen_helm.policy.planner.pipeline.unit_costs import measured_ranges
from flexgen_helm.policy.planner.search.choose import default_policy
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.runs.command_line import add_json, add_model, exit_on_sigterm, make_parser, reports_errors, write_json
from flexgen_helm.runs.slow_network.measure import Setting, measure
from flexgen_helm.runtime.planning.command import planned_shapes, space_of
from flexgen_helm.runtime.planning.sources import device_of, open_source

NETWORKS = ("1Gbit/s,10ms", "100Mbit/s,100ms")
POLICY = "gpu_batch_size=16,num_gpu_batches=1,gpu_batch_tokens=64,block_tokens=512"


@dataclass(frozen=True)
class Outcome:
    """A measurement beside its prediction. Rates are new tokens per second.

    Attributes:
        network: Rate and latency.
        lanes: Sweeps in flight.
        measured: What `bench` reports.
        predicted: What the plan says.
        binding: What binds by the plan.
    """

    network: str
    lanes: int
    measured: float
    predicted: float
    binding: str


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser: argparse.ArgumentParser = make_parser("slow_network", __doc__)
    add_model(parser)
    parser.add_argument("--networks", nargs="+", type=parse_network, default=[parse_network(each) for each in NETWORKS])
    parser.add_argument("--stages", type=int, default=2, metavar="N", help="processes (%(default)s)")
    parser.add_argument("--lanes", nargs="+", type=int, metavar="N", help="sweeps in flight (as many as stages, and 1)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (%(default)s)")
    parser.add_argument("--num-jobs", type=int, default=64, metavar="N")
    parser.add_argument("--prompt-len", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--gen-len", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--policy", default=POLICY, help="of every stage (%(default)s)")
    parser.add_argument("--dummy-weights", action="store_true", help="random weights; a folder with a config.json is enough")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="profile of a stage (default: measured)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="of each measurement (%(default)s)")
    add_json(parser)
    found: argparse.Namespace = parser.parse_args(arguments)
    return found


@reports_errors
def main() -> int:
    """Print the table and return the exit status."""
    exit_on_sigterm()
    options = parse()
    sizes = (options.num_jobs, options.prompt_len, options.gen_len)
    model = options.model or smollm2_folder()
    setting = Setting(model, options.stages, options.threads, *sizes, options.policy, options.timeout, options.dummy_weights)
    with tempfile.TemporaryDirectory() as folder:
        file = options.profile or measure_machine(setting, Path(folder, "profile.json"))
        outcomes = list(_outcomes(replace(setting, profile=file), options.networks, options.lanes or (options.stages, 1)))
    print("\n".join(table(outcomes)))
    write_json(options.json, [asdict(each) for each in outcomes])
    return 0


def _outcomes(setting: Setting, networks: Sequence[Network], numbers: Sequence[int]) -> Iterator[Outcome]:
    """Predict and measure with every network and number of sweeps in flight."""
    assert setting.profile is not None
    profile = read_profile(setting.profile)
    for network in networks:
        for lanes in numbers:
            made = predict(setting, profile, network, lanes)
            found = measure(setting, network, lanes)
            outcome = Outcome(str(network), lanes, found["throughput"], made.tokens_per_second, made.binding)
            print(outcome, file=sys.stderr, flush=True)
            yield outcome


def measure_machine(setting: Setting, file: Path) -> Path:
    """Measure this machine for the model and its rows, with the threads of one process; returns the file, where that is.

    Raises:
        FlexGenError: If that fails.
    """
    command = ["profile", "--model", str(setting.model), "--dtype", "float32", "--device", "cpu", "--out", str(file)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    done = subprocess.run([sys.executable, "-m", "flexgen_helm.cli", *command], check=False, env=variables)
    if done.returncode:
        raise FlexGenError(f"`flexgen-helm {' '.join(command)}` failed; its reason is above.")
    return file


def predict(setting: Setting, profile: MachineProfile, network: Network, lanes: int) -> PipelinePrediction:
    """Predict a measurement."""
    shapes = planned_shapes(open_source(setting.model, "float32", device_of(profile)), None)
    space = space_of(profile, {})
    policy = default_policy(shapes, profile, space, parse_policy(setting.policy))
    ranges = measured_ranges(shapes, policy, (profile, space), setting.stages)
    stages = Stages.of(shapes, policy, (profile, space), ranges, lanes=lanes)
    workload = Workload.uniform(setting.num_jobs, setting.prompt_len, setting.gen_len)
    return simulate_pipeline(stages, workload, network, exactly=True)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines of a table in Markdown."""
    found = [
        "| network | sweeps in flight | measured, tokens/s | predicted | predicted over measured | times one sweep | binds |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        one = next((other.measured for other in outcomes if (other.network, other.lanes) == (each.network, 1)), None)
        times = "-" if one is None else f"{each.measured / one:.2f}"
        cells = [each.network, str(each.lanes), f"{each.measured:.2f}", f"{each.predicted:.2f}"]
        found.append("| " + " | ".join([*cells, f"{each.predicted / each.measured:.2f}", times, each.binding]) + " |")
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Print a table: for the machine of the FlexGen paper, policies that the search finds, predictions, and the paper's figures.

It predicts only, which takes a few minutes of processor time on any machine.

Command: ``python -m flexgen_helm.runs.policy_table --models 6.7b 30b``
"""

from __future__ import annotations

import itertools
import sys
from contextlib import suppress
from typing import NamedTuple

from flexgen_helm.compression.config import resolve
from flexgen_helm.errors import PolicyError
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.machine.profile_file import named_profile
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.search.choice import Constraints
from flexgen_helm.policy.planner.search.choose import Problem, choose_policy
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.runs.command_line import make_parser, reports_errors
from flexgen_helm.runtime.planning.command import planned_shapes, space_of
from flexgen_helm.runtime.planning.sources import device_of, open_source
from flexgen_helm.types import ON_DEVICE, ON_HOST, ResolvedPolicy, Shares

PROMPT_LEN, GEN_LEN, NUM_JOBS = 512, 32, 512
ON_DISK: Shares = (0.0, 0.0, 1.0)
ROW_TOKENS, BLOCK_TOKENS = (4096, 2048, 1024, 512), (65536, 16384, 4096, 2048)
"""Sizes of prefill rows and of blocks that are tried for the paper's policies. FlexGen computes a whole GPU batch at once."""


class Case(NamedTuple):
    """A column of the paper's Table 2, and its policy (gpu_batch_size, num_gpu_batches, weights, cache, cpu_attention)."""

    model: str
    paper: float
    size: int
    batches: int
    weights: Shares
    cache: Shares
    cpu_attention: float


CASES = (
    Case("facebook/opt-6.7b", 25.26, 2, 1, ON_DEVICE, ON_DEVICE, 0),
    Case("facebook/opt-6.7b@w4kv4", 29.12, 72, 1, ON_DEVICE, ON_DEVICE, 0),
    Case("facebook/opt-30b", 7.32, 48, 3, (0.0834, 0.9166, 0.0), ON_HOST, 1),
    Case("facebook/opt-30b@w4kv4", 8.70, 16, 20, ON_HOST, ON_HOST, 0),
    Case("facebook/opt-175b", 0.69, 32, 8, (0.0, 0.5, 0.5), ON_DISK, 0),
    Case("facebook/opt-175b@w4kv4", 1.12, 48, 3, ON_HOST, ON_HOST, 0),
)


@reports_errors
def main() -> int:
    """Print the table and return the exit status."""
    parser = make_parser("policy_table", __doc__)
    parser.add_argument(
        "--models", nargs="+", default=[""], metavar="TEXT", help="those whose names contain one of these (all)"
    )
    models = parser.parse_args().models
    profile = named_profile("t4")
    space = space_of(profile, {})
    workload = Workload.uniform(NUM_JOBS, PROMPT_LEN, GEN_LEN)
    names = ["model", "paper measured", "paper's policy, predicted", "default", "searched", "rows too", "its policy", "binds"]
    print("| " + " | ".join(names) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for case in (case for case in CASES if any(text in case.model for text in models)):
        name, compression = resolve(case.model)
        shapes = planned_shapes(open_source(name, "auto", device_of(profile)), compression)
        kept = choose_policy(Problem.of(shapes, workload, profile, space))
        free = choose_policy(Problem.of(shapes, workload, profile, space, constraints=Constraints(search_numerics=True)))
        paper = paper_policy(case, shapes, profile, space)
        own = "does not fit" if paper is None else f"{paper.tokens_per_second:.2f}"
        default = "does not fit" if kept.default is None else f"{kept.default.tokens_per_second:.2f}"
        best = free.prediction
        cells = [case.model, f"{case.paper:.2f}", own, default, f"{kept.prediction.tokens_per_second:.2f}"]
        print("| " + " | ".join([*cells, f"{best.tokens_per_second:.2f}", describe(best), best.binding]) + " |", flush=True)
    return 0


def paper_policy(case: Case, shapes: ModelShapes, profile: MachineProfile, space: Space) -> Prediction | None:
    """Predict the paper's policy with the prefill rows and the prompt tokens of a sweep that are fastest; None: none fit."""
    count = case.size * case.batches
    found = []
    for rows, block in itertools.product(ROW_TOKENS, BLOCK_TOKENS):
        policy = ResolvedPolicy(
            gpu_batch_size=case.size,
            gpu_batch_tokens=min(rows, count * PROMPT_LEN),
            num_gpu_batches=case.batches,
            block_tokens=min(block, count * PROMPT_LEN),
            weights=case.weights,
            cache=case.cache,
            cpu_attention=case.cpu_attention,
        )
        with suppress(PolicyError):
            plan = MemoryPlan.of(shapes, policy, space)
            found.append(simulate(plan, Workload.uniform(count, PROMPT_LEN, GEN_LEN), profile))
    return max(found, key=lambda each: each.tokens_per_second, default=None)


def describe(made: Prediction) -> str:
    """Return a policy in the paper's terms: sizes, then per cent of weights and cache on device and host."""
    policy = made.policy
    shares = [f"{100 * share:.0f}" for each in (policy.weights or ON_DEVICE, policy.cache) for share in each[:2]]
    attends = ", CPU attends" if policy.cpu_attention and policy.cache[1] else ""
    sizes = f"{policy.gpu_batch_size}x{policy.num_gpu_batches}, {policy.block_tokens or 'auto'} prompt tokens"
    return f"{sizes}, weights {shares[0]} {shares[1]}, cache {shares[2]} {shares[3]}{attends}"


if __name__ == "__main__":
    sys.exit(main())

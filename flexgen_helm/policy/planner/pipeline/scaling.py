"""Scaling: what more stages bring, and which policy each number of them takes. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from flexgen_helm.errors import FlexGenError, OutOfSpace, PolicyError
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.planner.pipeline.divided import Stages, even_ranges
from flexgen_helm.policy.planner.pipeline.network import Network
from flexgen_helm.policy.planner.pipeline.predict import PipelinePrediction, simulate_pipeline
from flexgen_helm.policy.planner.search.choose import Problem, choose_policy
from flexgen_helm.policy.planner.sweeps import plan_capacity
from flexgen_helm.types import ON_DEVICE, Policy, ResolvedPolicy

ROW_STEP = 8
"""Sizes of decode rows that are tried are multiples of it."""
ROW_TOKENS = 2048
"""Tokens of prefill rows that are tried where everything is on the device."""
PAYS = 0.05
"""Part of the speed that more stages must add to pay."""


@dataclass(frozen=True)
class Scaling:
    """What numbers of stages are predicted to bring.

    Attributes:
        predictions: By number of stages, in rising order.
        refused: Why there is no prediction for the others.
    """

    predictions: Mapping[int, PipelinePrediction]
    refused: Mapping[int, str] = field(default_factory=dict)

    @property
    def pays(self) -> int:
        """The largest number of stages that is faster than every smaller one by more than `PAYS`."""
        found, best = 0, 0.0
        for count, each in self.predictions.items():
            if each.tokens_per_second > (1 + PAYS) * best:
                found = count
            best = max(best, each.tokens_per_second)
        return found

    def speedup(self, count: int) -> float:
        """Return how many times faster a number of stages is than the fewest that can run."""
        fewest = next(iter(self.predictions.values()))
        return self.predictions[count].tokens_per_second / fewest.tokens_per_second

    def efficiency(self, count: int) -> float:
        """Return the speed of one of so many stages, as a share of that of one of the fewest."""
        return self.speedup(count) * next(iter(self.predictions)) / count


def scaling(problem: Problem, counts: Sequence[int], network: Network, *, lanes: int | None = None) -> Scaling:
    """Predict a run on several numbers of stages.

    Args:
        problem: What is asked, and the machine of each stage.
        counts: Numbers of stages, in rising order.
        network: What lies between two stages.
        lanes: Sweeps that are in flight; None: as many as stages.

    Raises:
        PolicyError: If none of them can run; it is the last one's.
    """
    found: dict[int, PipelinePrediction] = {}
    refused: dict[int, FlexGenError] = {}
    for count in counts:
        try:
            found[count] = best_pipeline(problem, count, network, lanes=lanes)
        except (OutOfSpace, PolicyError) as error:
            refused[count] = error
    if not found:
        raise list(refused.values())[-1]
    return Scaling(found, {count: str(error) for count, error in refused.items()})


def best_pipeline(problem: Problem, count: int, network: Network, *, lanes: int | None = None) -> PipelinePrediction:
    """Predict a run on so many stages, under the fastest of a few policies.

    These are the default one, what the search finds for the largest stage alone, whose block is also divided over the lanes,
    and where row sizes may change one with everything on the device.

    Args:
        problem: See `scaling`.
        count: Number of stages.
        network: See `scaling`.
        lanes: See `scaling`.

    Raises:
        PolicyError: If no policy fits, or the profile lacks a rate.
        OutOfSpace: If a prompt fits into no lane.
    """
    lanes = min(lanes or count, max(1, len(problem.workload.prompts)))
    ranges = even_ranges(problem.shapes, count)
    found: list[PipelinePrediction] = []
    refused: FlexGenError | None = None
    for policy in _policies(problem, ranges, lanes):
        try:
            stages = Stages.of(problem.shapes, policy, (problem.profile, problem.space), ranges, lanes=lanes)
            found.append(simulate_pipeline(stages, problem.workload, network))
        except (OutOfSpace, PolicyError) as error:
            refused = refused or error
    if not found:
        raise refused or PolicyError(f"No policy was found for {count} stages.")
    return min(found, key=lambda each: each.seconds)


def _policies(problem: Problem, ranges: tuple[range, ...], lanes: int) -> Iterator[ResolvedPolicy]:
    """Yield policies that are tried, each once."""
    seen: list[ResolvedPolicy] = []
    for policy in _all_policies(problem, ranges, lanes):
        if policy not in seen:
            seen.append(policy)
            yield policy


def _all_policies(problem: Problem, ranges: tuple[range, ...], lanes: int) -> Iterator[ResolvedPolicy]:
    sizes = [problem.shapes.of_layers(layers) for layers in ranges]
    largest = max(sizes, key=lambda shapes: shapes.total_bytes)
    constraints = replace(problem.constraints, max_latency=None, min_throughput=None)
    alone = Problem.of(largest, problem.workload, problem.profile, problem.space, asked=problem.asked, constraints=constraints)
    yield alone.base
    try:
        choice = choose_policy(alone)
    except PolicyError:
        return
    yield choice.policy
    if constraints.search_numerics and problem.asked == Policy():
        with suppress(PolicyError):  # does not fit
            yield _resident(alone, lanes)
    if lanes > 1 and problem.asked.num_gpu_batches == Policy.num_gpu_batches:
        for parts in (lanes, -(-lanes // 2)):
            yield _divided(choice.policy, parts, rows_too=constraints.search_numerics)


def _resident(alone: Problem, lanes: int) -> ResolvedPolicy:
    """Return a policy with all weights, K and V on the device, and decode rows of as many sequences as fit in a lane.

    Raises:
        PolicyError: If the weights, or `ROW_STEP` sequences of each lane, do not fit.
    """
    placed = replace(alone.base, weights=ON_DEVICE, cache=ON_DEVICE, cpu_attention=0.0, num_gpu_batches=1)
    placed = replace(placed, gpu_batch_tokens=ROW_TOKENS, block_tokens=ROW_TOKENS)
    plan = MemoryPlan.of(alone.shapes, replace(placed, gpu_batch_size=ROW_STEP), alone.space)
    room = plan_capacity(plan).cache_bytes["device"] / lanes
    longest = max(len(prompt.tokens) + max(prompt.new_tokens, default=0) for prompt in alone.workload.prompts)
    fitting = int(room // plan.cache.sequence_bytes(longest)) // ROW_STEP * ROW_STEP
    if not fitting:
        raise PolicyError("K and V of the sequences of a lane do not fit on the device.")
    return replace(placed, gpu_batch_size=min(fitting, alone.base.gpu_batch_size))


def _divided(policy: ResolvedPolicy, parts: int, *, rows_too: bool) -> ResolvedPolicy:
    """Return a policy whose block is a part of another one's.

    Args:
        policy: The other one.
        parts: How many parts there are.
        rows_too: Whether rows may be made smaller, which changes bits of answers.
    """
    count = policy.num_gpu_batches // parts
    size = policy.block_size // parts // ROW_STEP * ROW_STEP
    if count == 0 and rows_too and size:
        return dataclasses.replace(policy, gpu_batch_size=min(size, policy.gpu_batch_size), num_gpu_batches=1)
    return dataclasses.replace(policy, num_gpu_batches=max(1, count))

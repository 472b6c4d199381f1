"""Sweeps of a pipeline in the order in which its first stage plans them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from flexgen_helm.policy.planner.loads import SweepLoad
from flexgen_helm.policy.planner.pipeline.divided import Stages
from flexgen_helm.policy.planner.sweeps import ALIKE, sweep_loads
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload


@dataclass(frozen=True)
class LaneSweeps:
    """What all lanes do.

    Attributes:
        loads: Loads of sweeps, in the order in which they first occur.
        order: Lane and number of the load of each sweep, in the order in which every stage handles them.
    """

    loads: tuple[SweepLoad, ...]
    order: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, stages: Stages, workload: Workload, *, alike: int = ALIKE) -> LaneSweeps:
        """Let the scheduler of each lane plan its part of the prompts; lanes take turns, as long as they have work.

        Args:
            stages: The pipeline.
            workload: What is asked.
            alike: Most sweeps of a lane for which one load stands.

        Raises:
            OutOfSpace: If a prompt does not fit into the cache of a lane.
        """
        capacity = stages.capacity
        made: dict[Workload, list[SweepLoad]] = {}
        turns: dict[int, Iterator[SweepLoad]] = {}
        for lane, part in enumerate(parts(workload, stages.lanes)):
            renamed = _renamed(part)
            if renamed not in made:
                made[renamed] = list(sweep_loads(stages.plans[0], part, alike=alike, capacity=capacity))
            turns[lane] = _numbered(made[renamed])
        found: list[SweepLoad] = []
        known: dict[int, int] = {}
        order: list[tuple[int, int]] = []
        while turns:
            for lane in list(turns):
                load = next(turns[lane], None)
                if load is None:
                    del turns[lane]
                    continue
                if id(load) not in known:
                    known[id(load)] = len(found)
                    found.append(load)
                order.append((lane, known[id(load)]))
        return cls(tuple(found), tuple(order))


def parts(workload: Workload, lanes: int) -> list[Workload]:
    """Divide prompts over lanes: those that begin alike stay together, and each lane gets about as many tokens.

    A lane that gets none is left out.
    """
    prompts = sorted(workload.prompts, key=lambda prompt: prompt.tokens)
    sizes = [len(prompt.tokens) + sum(prompt.new_tokens) for prompt in prompts]
    found: list[list[PlannedPrompt]] = [[] for _ in range(lanes)]
    total, done = sum(sizes), 0
    for prompt, size in zip(prompts, sizes, strict=True):
        found[min(lanes - 1, done * lanes // total)].append(prompt)
        done += size
    return [Workload(tuple(part)) for part in found if part]


def _renamed(workload: Workload) -> Workload:
    """Return a workload with tokens that are numbered in the order in which they occur: equal ones lead to equal sweeps."""
    numbers: dict[int, int] = {}
    return Workload(
        tuple(
            replace(prompt, tokens=tuple(numbers.setdefault(token, len(numbers)) for token in prompt.tokens))
            for prompt in workload.prompts
        )
    )


def _numbered(loads: Iterable[SweepLoad]) -> Iterator[SweepLoad]:
    """Yield each load as many times as it stands for."""
    return (load for load in loads for _ in range(load.count))

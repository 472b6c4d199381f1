"""Automatic policy: placement and blocks are searched for the workload if the engine cannot hold everything on the device."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from flexgen_helm.errors import InvalidJob, PolicyError
from flexgen_helm.generation.prepare import PreparedJob, prepare
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.search.choice import Choice
from flexgen_helm.policy.planner.search.choose import choose_policy
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.runtime.planning.machine_profile import Subject, machine_profile
from flexgen_helm.runtime.planning.text import Planned, lines
from flexgen_helm.types import ON_DEVICE, Job, ResolvedPolicy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Automatic:
    """A policy that was searched, and the machine with which it was.

    Attributes:
        choice: What the search found.
        profile: The machine.
    """

    choice: Choice
    profile: MachineProfile


def automatic_policy(
    source: ModelSource, shapes: ModelShapes, policy: ResolvedPolicy, space: Space, options: EngineOptions
) -> Automatic | None:
    """Search the policy for the workload of an engine, if the user leaves it open and the default would stream anything.

    Args:
        source: The model.
        shapes: Its sizes.
        policy: The default policy, with row sizes and the place of attention, which stay: they are numerics.
        space: Bytes of each tier that may be used.
        options: Options of the user.

    Returns:
        What the search found; None: nothing was searched.

    Raises:
        PolicyError: If no policy fits. The message names what cannot be met, and what would be enough.
    """
    if options.workload is None or not policy.auto or _fits(shapes, policy, space, options.workload):
        return None
    profile = options.profile or machine_profile(options.device, subject=Subject(source, policy), folder=options.folder)
    asked = replace(options.asked, gpu_batch_size=policy.gpu_batch_size, gpu_batch_tokens=policy.gpu_batch_tokens)
    if space.own_memory:
        asked = replace(asked, cpu_attention=policy.cpu_attention)
    choice = choose_policy(shapes, options.workload, profile, space, asked=asked)
    for line in lines(Planned(source.name, profile, choice, {}), shapes, space):
        logger.info(line)
    return Automatic(choice, profile)


def known_workload(source: ModelSource, jobs: Iterable[Job] | Workload | None) -> Workload | None:
    """Return the workload of jobs that nobody has prepared yet.

    Args:
        source: The model, whose tokenizer and context decide.
        jobs: The jobs. One that cannot be served is left out; it gets its error when it is run. None: nobody knows them.
    """
    if jobs is None or isinstance(jobs, Workload):
        return jobs
    model = source.described(source.empty)
    prepared = []
    for job in jobs:
        with suppress(InvalidJob):
            known = prepare(job, tokenizer=model.tokenizer, max_length=model.max_length, vocab_size=model.vocab_size)
            prepared.append(known)
    return workload_of(prepared)


def workload_of(jobs: Iterable[PreparedJob]) -> Workload:
    """Return the workload of some jobs: equal prompts count once, and answers are as long as they may be."""
    prompts: dict[tuple[int, ...], PlannedPrompt] = {}
    for prepared in jobs:
        job, tokens = prepared.job, prepared.input_ids
        asked = prompts.get(tokens, PlannedPrompt(tokens))
        new = (job.max_new_tokens,) * job.num_completions if job.max_new_tokens else ()
        prompts[tokens] = replace(asked, new_tokens=asked.new_tokens + new, score=asked.score or job.score_prompt)
    return Workload(tuple(prompts.values()))


def _fits(shapes: ModelShapes, policy: ResolvedPolicy, space: Space, workload: Workload) -> bool:
    """Return whether weights, and K and V of as many sequences as a block takes, are all on the device."""
    try:
        plan = MemoryPlan.of(shapes, policy, space)
    except PolicyError:
        return False
    if not plan.weights.is_resident or policy.cache != ON_DEVICE or policy.hidden != ON_DEVICE:
        return False
    lengths = [len(prompt.tokens) + new for prompt in workload.prompts for new in prompt.new_tokens if new > 1]
    wanted = sum(map(plan.cache.sequence_bytes, sorted(lengths, reverse=True)[: policy.block_size]))
    return wanted <= plan.cache.capacities(plan.left(space.available))["device"]

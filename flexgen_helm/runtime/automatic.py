"""Automatic policy: placement and blocks are searched for the workload if the engine cannot hold everything on the device."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from flexgen_helm.errors import InvalidJob, PolicyError
from flexgen_helm.generation.prepare import prepare
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.choice import Choice
from flexgen_helm.policy.planner.search import choose_policy
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.types import ON_DEVICE, Job, ResolvedPolicy

logger = logging.getLogger(__name__)


def automatic_policy(
    shapes: ModelShapes, policy: ResolvedPolicy, space: Space, options: EngineOptions
) -> tuple[ResolvedPolicy, Choice | None]:
    """Search the policy for the workload of an engine, if the user leaves it open and the default would stream anything.

    Args:
        shapes: Sizes of the model.
        policy: The default policy, with row sizes and the place of attention, which stay: they are numerics.
        space: Bytes of each tier that may be used.
        options: Options of the user.

    Returns:
        The policy, and what the search found; None: nothing was searched.

    Raises:
        PolicyError: If no policy fits. The message names what cannot be met, and what would be enough.
    """
    if options.workload is None or not policy.auto or _fits(shapes, policy, space, options.workload):
        return policy, None
    asked = replace(options.asked, gpu_batch_size=policy.gpu_batch_size, gpu_batch_tokens=policy.gpu_batch_tokens)
    if space.own_memory:
        asked = replace(asked, cpu_attention=policy.cpu_attention)
    choice = choose_policy(shapes, options.workload, options.profile or machine_profile(options.device), space, asked=asked)
    logger.info("policy: %s", choice.reason)
    return replace(choice.policy, auto=True), choice


def known_workload(source: ModelSource, jobs: Iterable[Job] | Workload | None) -> Workload | None:
    """Return the workload of some jobs: equal prompts count once, and answers are as long as they may be.

    Args:
        source: The model, whose tokenizer and context decide.
        jobs: The jobs. One that cannot be served is left out; it gets its error when it is run. None: nobody knows them.
    """
    if jobs is None or isinstance(jobs, Workload):
        return jobs
    model = source.described(source.empty)
    prompts: dict[tuple[int, ...], PlannedPrompt] = {}
    for job in jobs:
        with suppress(InvalidJob):
            tokens = prepare(job, tokenizer=model.tokenizer, max_length=model.max_length, vocab_size=model.vocab_size).input_ids
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

"""Automatic policy: placement and blocks are searched for the workload if the engine cannot hold everything on the device."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from flexgen_helm.errors import FlexGenError, InvalidJob, PolicyError
from flexgen_helm.generation.prepare import PreparedJob, prepare
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.policy.memory_plan import MemoryPlan
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.search.choice import Choice
from flexgen_helm.policy.planner.search.choose import Problem, choose_policy
from flexgen_helm.policy.planner.search.gains import gains
from flexgen_helm.policy.planner.workload import PlannedPrompt, Workload
from flexgen_helm.policy.space import Space
from flexgen_helm.runtime.engine_options import EngineOptions
from flexgen_helm.runtime.planning.machine_profile import Subject, machine_profile
from flexgen_helm.runtime.planning.text import Planned, lines
from flexgen_helm.types import ON_DEVICE, Job, Policy, ResolvedPolicy

logger = logging.getLogger(__name__)

LEAST_MEASURED = 2**26
"""Bytes of the smallest model for which this machine is measured: the runs of smaller ones take less time than that."""
LEAST_EXPLAINED = 60.0
"""Predicted seconds of the shortest run for which the plan says what more memory would bring: that takes a second itself."""
FALLBACK = "the default policy is used, because none could be searched: %s"


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

    The log has the plan. Where a search is not possible, it has the reason, and the default policy stays.

    Args:
        source: The model.
        shapes: Its sizes.
        policy: The default policy, with row sizes and the place of attention, which stay: they are numerics.
        space: Bytes of each tier that may be used.
        options: Options of the user.

    Returns:
        What the search found; None: nothing was searched.

    Raises:
        PolicyError: If the user's profile is of another kind of machine.
    """
    workload = options.workload
    if workload is None or not policy.auto:
        if options.profile is not None:
            reason = "no jobs are known in advance" if policy.auto else "the policy is given without `auto`"
            logger.warning("the profile %s is not used, because %s", options.profile.name, reason)
        return None
    default = _default_plan(shapes, policy, space)
    if default is not None:
        workload = _servable(default, workload)
    if not workload.prompts:
        return None
    if default is not None and _holds_all(default, workload):
        logger.info("the default policy stays: weights, K and V of the jobs all fit on the device")
        return None
    if options.profile is None and shapes.total_bytes < LEAST_MEASURED:
        logger.info("the default policy stays: this machine is not measured for so small a model; `profile` names a machine")
        return None
    _check_profile(options.profile, space)
    if options.rows == "single" or options.order != "zigzag":
        logger.warning(FALLBACK, f"predictions are for packed rows in zigzag order, not for {options.rows} and {options.order}")
        return None
    try:
        profile = _profile_of(options, Subject(source, policy, options.compile_layers))
        problem = Problem.of(shapes, workload, profile, space, asked=_asked(options, policy))
        choice = choose_policy(problem)
        found = gains(problem) if choice.prediction.seconds >= LEAST_EXPLAINED else {}
        text = lines(Planned(source.name, problem, choice, found))
    except Exception as error:  # a prediction is not worth the answers
        if default is not None:  # else its own plan says what does not fit
            logger.warning(FALLBACK, error if isinstance(error, FlexGenError) else f"{type(error).__name__}: {error}")
        return None
    for line in text:
        logger.info("%s", line)
    return Automatic(choice, profile)


def _profile_of(options: EngineOptions, subject: Subject) -> MachineProfile:
    """Return the user's profile, or that of this machine, with the times of layers of the kind that the engine has."""
    profile = options.profile or machine_profile(options.device, subject=subject, folder=options.folder)
    profile = profile.with_layers(compiled=options.compile_layers)
    if options.compile_layers and not profile.layers:
        logger.warning("predictions are for layers that are not compiled: the profile %s has no others", profile.name)
    return profile


def _check_profile(profile: MachineProfile | None, space: Space) -> None:
    """Refuse a user's profile of another kind of machine.

    Raises:
        PolicyError: If its device has a memory of its own and the engine's has none, or the reverse.
    """
    if profile is not None and profile.own_memory != space.own_memory:
        kinds = {True: "a device with a memory of its own", False: "one memory for device and host"}
        raise PolicyError(
            f"The profile {profile.name} is of a machine with {kinds[profile.own_memory]}, but this one has "
            f"{kinds[space.own_memory]}. Give a profile of such a machine, or leave it out."
        )


def _asked(options: EngineOptions, policy: ResolvedPolicy) -> Policy:
    """Return what the user asked for, with the numerics that were decided."""
    asked = replace(options.asked, gpu_batch_size=policy.gpu_batch_size, gpu_batch_tokens=policy.gpu_batch_tokens)
    return replace(asked, cpu_attention=policy.cpu_attention) if options.device.own_memory else asked


def known_workload(source: ModelSource, jobs: Iterable[Job] | Workload | None) -> Workload | None:
    """Return the workload of jobs that nobody has prepared yet.

    Args:
        source: The model, whose tokenizer and context decide.
        jobs: The jobs. One that cannot be served is left out; it gets its error when it is run. None: nobody knows them.

    Raises:
        InvalidJob: If it is no list of jobs.
    """
    if jobs is None or isinstance(jobs, Workload):
        return jobs
    if isinstance(jobs, Job):
        raise InvalidJob("workload is one job. Give a list of jobs: workload=[job].")
    model = source.described(source.empty)
    prepared = []
    for job in jobs:
        if not isinstance(job, Job):
            raise InvalidJob(f"workload has a {type(job).__name__}. Give a list of flexgen_helm.Job, or leave it out.")
        with suppress(InvalidJob):
            known = prepare(job, tokenizer=model.tokenizer, max_length=model.max_length, vocab_size=model.vocab_size)
            prepared.append(known)
    return workload_of(prepared)


def workload_of(jobs: Iterable[PreparedJob]) -> Workload:
    """Return the workload of some jobs: equal prompts count once, and answers are as long as they may be."""
    return Workload.of(map(_planned, jobs))


def _planned(prepared: PreparedJob) -> PlannedPrompt:
    job = prepared.job
    completions = 1 if prepared.is_greedy else job.num_completions
    new = (job.max_new_tokens,) * completions if job.max_new_tokens else ()
    return PlannedPrompt(prepared.input_ids, new, job.score_prompt)


def _default_plan(shapes: ModelShapes, policy: ResolvedPolicy, space: Space) -> MemoryPlan | None:
    """Return the plan of the default policy; None: it does not fit."""
    with suppress(PolicyError):
        return MemoryPlan.of(shapes, policy, space)
    return None


def _servable(plan: MemoryPlan, workload: Workload) -> Workload:
    """Return the prompts whose K and V fit; one that needs more gets its error when it is run."""
    room = sum(plan.cache.capacities(plan.left(plan.space.available)).values())

    def fits(prompt: PlannedPrompt) -> bool:
        return plan.cache.sequence_bytes(len(prompt.tokens) + max(prompt.new_tokens, default=0)) <= room

    return Workload(tuple(filter(fits, workload.prompts)))


def _holds_all(plan: MemoryPlan, workload: Workload) -> bool:
    """Return whether weights, and K and V of as many sequences as a block takes, are all on the device."""
    policy = plan.policy
    if not plan.weights.is_resident or policy.cache != ON_DEVICE or policy.hidden != ON_DEVICE:
        return False
    lengths = [len(prompt.tokens) + new for prompt in workload.prompts for new in prompt.new_tokens if new > 1]
    wanted = sum(map(plan.cache.sequence_bytes, sorted(lengths, reverse=True)[: policy.block_size]))
    return wanted <= plan.cache.capacities(plan.left(plan.space.available))["device"]

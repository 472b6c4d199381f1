"""The command `flexgen-helm plan`: from its options to a plan in words, as JSON and as plots."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flexgen_helm.attention.chunks import GATHERED_BYTES
from flexgen_helm.compression.config import CompressionConfig, resolve, with_variant
from flexgen_helm.errors import PolicyError
from flexgen_helm.loading.source import ModelSource
from flexgen_helm.machine.profile import MachineProfile
from flexgen_helm.machine.profile_file import named_profile
from flexgen_helm.memory.amounts import parse_max_memory
from flexgen_helm.memory.device import Device, resolve_device
from flexgen_helm.policy.model_shapes import ModelShapes
from flexgen_helm.policy.planner.search.choice import Constraints
from flexgen_helm.policy.planner.search.choose import Problem, choose_policy
from flexgen_helm.policy.planner.search.gains import gains
from flexgen_helm.policy.planner.search.variants import with_packed_weights
from flexgen_helm.policy.planner.workload import Workload
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.policy.shapes_of_model import plain_formats, shapes_of
from flexgen_helm.policy.space import Space
from flexgen_helm.runtime.engine_options import cache_format_of
from flexgen_helm.runtime.free_space import GATHER_COPIES, GPU_PROCESS_BYTES, PROCESS_BYTES
from flexgen_helm.runtime.planning.machine_profile import Subject, machine_profile
from flexgen_helm.runtime.planning.pipeline_command import check_options, run_pipeline_plan
from flexgen_helm.runtime.planning.sources import device_of, open_source
from flexgen_helm.runtime.planning.text import Planned, as_json, lines
from flexgen_helm.types import TIERS, Tier

OpenSource = Callable[[Any, str, Device], ModelSource]


def run_plan(args: Namespace, say: Callable[[str], None]) -> int:
    """Choose a policy, print it with what it takes, and draw what was asked for.

    Args:
        args: Options of the command.
        say: Told what happens, a line at a time.

    Raises:
        FlexGenError: If the model or the profile cannot be read, options contradict each other, or no policy fits.
    """
    check_options(args)
    name, compression, source, profile, space = stage_of(args, say)
    tiers: frozenset[Tier] = frozenset(tier for tier in TIERS if tier not in args.without)
    constraints = Constraints(args.max_latency, args.min_throughput, tiers, args.search_numerics)
    workload = Workload.uniform(args.num_jobs, args.prompt_len, args.gen_len, score=args.gen_len == 0)
    problems = {
        with_variant(name, each): Problem.of(
            planned_shapes(source, each), workload, profile, space, asked=args.policy, constraints=constraints
        )
        for each in (compression, *args.allow)
    }
    if args.stages is not None:
        return run_pipeline_plan(args, *next(iter(problems.items())))
    planned = _fastest(problems)
    print(json.dumps(as_json(planned)) if args.json else "\n".join(lines(planned)))
    if args.plot is not None:
        from flexgen_helm.runtime.planning.plot import draw

        for file in draw(args.plot, planned.problem, planned.choice):
            say(f"plot: {file}")
    return 0


class Stage(NamedTuple):
    """A model and a machine for which something is planned.

    Attributes:
        name: Name of the model, without a variant.
        compression: The variant; None: the model as it is.
        source: The model.
        profile: The machine.
        space: Bytes of each tier that may be used.
    """

    name: str
    compression: CompressionConfig | None
    source: ModelSource
    profile: MachineProfile
    space: Space


def stage_of(args: Namespace, say: Callable[[str], None], *, opened: OpenSource = open_source) -> Stage:
    """Return what the options of a command name.

    Args:
        args: Its options: ``model``, ``config``, ``dtype``, ``machine``, ``device``, ``max_memory``, and ``policy``.
        say: Told what is measured, a line at a time.
        opened: Opens the model.

    Raises:
        FlexGenError: If the model or the profile cannot be read, or options contradict each other.
    """
    name, compression = resolve(args.model)
    named = None if args.machine is None else named_profile(args.machine)
    if named is not None and args.device != "auto":
        raise PolicyError(f"--device {args.device} is of this machine, but --machine names another one. Leave one of them out.")
    device = resolve_device(args.device) if named is None else device_of(named)
    source = opened(args.config or name, args.dtype, device)
    profile = (named or _measured(args, source, device, say)).with_layers(compiled=args.compile_layers)
    if args.compile_layers and not profile.layers:
        raise PolicyError(
            f"The profile {profile.name} has no times of compiled layers. Leave --compile-layers out, or measure them with "
            "`flexgen-helm profile --model M --compile-layers --out FILE` and name that file."
        )
    return Stage(name, compression, source, profile, space_of(profile, parse_max_memory(args.max_memory)))


def _fastest(problems: Mapping[str, Problem]) -> Planned:
    """Plan a model and the variants of it that are allowed; returns the plan that takes least time, with what the others take.

    Raises:
        PolicyError: If there is a plan for none of them; it is the first one's.
    """
    plans: dict[str, Planned] = {}
    refused: dict[str, PolicyError] = {}
    for name, problem in problems.items():
        try:
            plans[name] = Planned(name, problem, choose_policy(problem))
        except PolicyError as error:
            refused[name] = error
    if not plans:
        raise next(iter(refused.values()))
    best = min(plans.values(), key=lambda plan: plan.choice.prediction.seconds)
    others = {name: plan.choice.prediction for name, plan in plans.items() if plan is not best}
    return best._replace(gains=gains(best.problem), others=others, refused={name: str(each) for name, each in refused.items()})


def planned_shapes(source: ModelSource, compression: CompressionConfig | None) -> ModelShapes:
    """Return the sizes of a model or of a variant of it, whose packed weights are estimated by their bits."""
    whole = source.empty
    shapes = shapes_of(whole, plain_formats(whole), source.dtype, cache_format_of(compression))
    if compression is None or compression.bits is None:
        return shapes
    return with_packed_weights(shapes, compression.bits, compression.weight_scheme)


def space_of(profile: MachineProfile, limits: dict[Tier, int]) -> Space:
    """Return the bytes that an engine may use on a machine: all but a reserve, and no more than the user allows."""
    reserve = {"device": GPU_PROCESS_BYTES if profile.is_gpu else PROCESS_BYTES, "host": PROCESS_BYTES, "disk": 0}
    available = {tier: min(profile.memory[tier] - reserve[tier], limits.get(tier, profile.memory[tier])) for tier in TIERS}
    if not profile.own_memory and {"device", "host"} & limits.keys():
        ram = limits.get("device", 0) + limits.get("host", 0)
        available["device"] = available["host"] = min(profile.memory["host"] - PROCESS_BYTES, ram)
    scratch = GATHER_COPIES * GATHERED_BYTES if profile.is_gpu else 0
    return Space(available, profile.own_memory, limits, is_gpu=profile.is_gpu, scratch_bytes=scratch)


def _measured(args: Namespace, source: ModelSource, device: Device, say: Callable[[str], None]) -> MachineProfile:
    """Return the profile of this machine, which is measured if it is not known yet."""
    subject = Subject(source, resolved(args.policy, device), args.compile_layers)
    return machine_profile(device, subject=subject, say=say, say_part=lambda part: say(f"  {part}"))

"""Make the parts of an engine on each stage of a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flexgen_helm.distributed.group import StageGroup
from flexgen_helm.distributed.messages import Build
from flexgen_helm.errors import StageLost
from flexgen_helm.memory.device import resolve_device
from flexgen_helm.policy.row_sizes import resolved
from flexgen_helm.runtime.building import Parts, build
from flexgen_helm.runtime.opening import EngineArguments
from flexgen_helm.runtime.pipeline.stage import Stage, stage_device
from flexgen_helm.types import Policy

logger = logging.getLogger(__name__)


def make_first(group: StageGroup, arguments: EngineArguments, write_text: Callable[[Path], Tensor]) -> Parts:
    """Make the first stage's part of an engine, and let the others make theirs.

    Args:
        group: The stages.
        arguments: What the user gives. Row sizes that it leaves open are those of the first stage.
        write_text: See `flexgen_helm.runtime.building.build`.

    Raises:
        FlexGenError: If a stage cannot make its part; the message names it.
        StageLost: If a stage is lost.
    """
    group.begin_epoch()
    arguments = replace(arguments, policy=_with_rows(arguments))
    for stage in range(1, group.count):
        group.send_and_wait(Build(arguments), stage)
    try:
        return make_parts(group, arguments, write_text)
    except StageLost:
        raise
    except BaseException as error:
        group.fail(error)
        raise


def make_parts(group: StageGroup, arguments: EngineArguments, write_text: Callable[[Path], Tensor] | None = None) -> Parts:
    """Make this stage's part of an engine; all stages must call it.

    Args:
        group: The stages.
        arguments: What the user gave on the first stage.
        write_text: See `flexgen_helm.runtime.building.build`; the first stage writes texts.
    """
    stage = Stage(group)
    arguments = replace(arguments, device=stage_device(arguments.device))
    limit = stage.memory_limit(resolve_device(arguments.device), arguments.max_memory)
    options = replace(arguments, max_memory=limit).options(stage)
    return build(arguments.source(options), options, write_text or _refuse)


def _with_rows(arguments: EngineArguments) -> Policy:
    """Return the policy with the row sizes that the first stage would have alone."""
    asked = arguments.policy if isinstance(arguments.policy, Policy) else Policy()
    if arguments.policy == "auto" or asked.auto:
        logger.info("no policy is searched for stages: device, host and disk are filled in this order")
    sizes = resolved(asked, resolve_device(stage_device(arguments.device)))
    return replace(asked, gpu_batch_size=sizes.gpu_batch_size, gpu_batch_tokens=sizes.gpu_batch_tokens, auto=False)


def _refuse(_: Path) -> Tensor:
    raise AssertionError("the first stage writes the text to which weights are fitted")

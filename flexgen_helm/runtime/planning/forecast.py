"""Forecast: what the planner expects of a run before it begins, to be compared with what is measured."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.run_stats import Forecast
from flexgen_helm.runtime.building import Parts
from flexgen_helm.runtime.intake import Ticket
from flexgen_helm.runtime.planning.automatic import workload_of

logger = logging.getLogger(__name__)


def forecast(parts: Parts, tickets: Iterable[Ticket]) -> Forecast | None:
    """Predict a run on the machine for which the engine's policy was searched.

    Args:
        parts: The engine.
        tickets: The jobs of the run.

    Returns:
        The prediction; None: the policy was not searched, rows are not those that are predicted, or nothing is asked.
    """
    if parts.automatic is None or parts.checked.passed.kind != "packed":
        return None
    workload = workload_of(ticket.prepared for ticket in tickets)
    if not workload.prompts:
        return None
    try:
        made = simulate(parts.plan, workload, parts.automatic.profile)
    except Exception as error:  # a prediction is not worth the answers
        logger.warning("the run is not predicted: %s: %s", type(error).__name__, error)
        return None
    logger.info(
        "expected: %.3g s in %d sweeps, %.3g token/s; %s is busy longest",
        *(made.seconds, made.sweeps, made.tokens_per_second, made.binding.replace("_", " ")),
    )
    return Forecast(
        machine=parts.automatic.profile.name,
        seconds=made.seconds,
        sweeps=made.sweeps,
        peak_bytes={str(tier): count for tier, count in made.running_bytes.items()},
        bytes_moved=dict(made.bytes_moved),
        busy_seconds=dict(made.busy_seconds),
    )

"""Forecast: what the planner expects of a run before it begins, to be compared with what is measured."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.policy.planner.simulate import simulate
from flexgen_helm.runtime.building import Parts
from flexgen_helm.runtime.intake import Ticket
from flexgen_helm.runtime.planning.automatic import workload_of

logger = logging.getLogger(__name__)


def prediction(parts: Parts, tickets: Iterable[Ticket]) -> Prediction | None:
    """Predict a run on the machine for which the engine's policy was searched; None: it was not searched.

    Args:
        parts: The engine.
        tickets: The jobs of the run.
    """
    if parts.automatic is None or parts.checked.passed.kind != "packed":
        return None
    expected = simulate(parts.plan, workload_of(ticket.prepared for ticket in tickets), parts.automatic.profile)
    logger.info(
        "expected: %.0f s in %d sweeps, %.1f token/s; most time goes into %s",
        *(expected.seconds, expected.sweeps, expected.tokens_per_second, expected.binding),
    )
    return expected

"""Choice: what a search may do, and what it found. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_helm.policy.planner.prediction import Prediction
from flexgen_helm.types import TIERS, ResolvedPolicy, Tier


@dataclass(frozen=True)
class Constraints:
    """What the user demands of a policy.

    Attributes:
        max_latency: Most seconds until the first job is answered; None: any.
        min_throughput: Least new tokens per second (prompt tokens where none are generated); None: any.
        tiers: Tiers that may be used.
        search_numerics: Whether row sizes and the place of attention may be chosen, which change bits of answers.
    """

    max_latency: float | None = None
    min_throughput: float | None = None
    tiers: frozenset[Tier] = frozenset(TIERS)
    search_numerics: bool = False

    def met_by(self, prediction: Prediction) -> bool:
        """Return whether a prediction keeps latency and throughput."""
        late = self.max_latency is not None and prediction.latency_seconds > self.max_latency
        slow = self.min_throughput is not None and prediction.tokens_per_second < self.min_throughput
        return not late and not slow


@dataclass(frozen=True)
class Choice:
    """A policy and what it is better than.

    Attributes:
        policy: The policy, with shares of which `MemoryPlan.of` makes the plan that was predicted.
        prediction: What a run under it is expected to take.
        alternatives: Predictions for others that were tried, best first.
        default: Prediction for the plain default policy; None: it does not fit, or may not be used.
        reason: Why it was chosen, in one line for the log.
    """

    policy: ResolvedPolicy
    prediction: Prediction
    alternatives: tuple[Prediction, ...]
    default: Prediction | None
    reason: str

"""Prediction: what a run under a policy is expected to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexgen_helm.types import ResolvedPolicy, Tier


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to take.

    Attributes:
        policy: The policy, with realised shares of whole layers.
        seconds: Time of the run, loading not counted.
        prompt_tokens: Prompt tokens that are computed.
        generated_tokens: New tokens.
        sweeps: Number of sweeps.
        peak_bytes: Most bytes of each tier, from `MemoryPlan`, loading and the self-check included.
        running_bytes: The same while jobs run.
        bytes_moved: Bytes over each link.
        busy_seconds: Time in which each resource is busy.
        latency_seconds: Time until the first job is answered.
    """

    policy: ResolvedPolicy
    seconds: float
    prompt_tokens: int
    generated_tokens: int
    sweeps: int
    peak_bytes: Mapping[Tier, int]
    running_bytes: Mapping[Tier, int]
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    busy_seconds: Mapping[str, float] = field(default_factory=dict)
    latency_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second; where none are generated, prompt tokens per second."""
        return (self.generated_tokens or self.prompt_tokens) / self.seconds if self.seconds else 0.0

    @property
    def binding(self) -> str:
        """Resource that is busy longest."""
        return max(self.busy_seconds, key=self.busy_seconds.__getitem__, default="none")

"""What is measured of a run: a plain dataclass of the whole, and one of each sweep. No torch, no HELM."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

MOST_SWEEPS = 200
"""Sweeps of a run that are listed one by one in a record."""


@dataclass(frozen=True)
class SweepStats:
    """Measurements of one sweep. Its time begins when the time of the sweep before it ends."""

    begin: float
    """Seconds since the run began."""
    seconds: float
    prompt_tokens: int
    """Tokens that went through the layers in prefill rows."""
    decode_tokens: int
    """Tokens that went through the layers in decode rows."""
    generated_tokens: int
    """Tokens chosen at the end of the sweep, including the first ones after its prompts."""
    bytes_moved: dict[str, int] = field(default_factory=dict)
    """Bytes that each resource moved in transfers that ended in this sweep; for ``cpu_attention`` bytes of K and V read."""
    weight_bytes_moved: dict[str, int] = field(default_factory=dict)
    """Part of ``bytes_moved`` that is weights."""
    busy_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds in which each resource did at least one thing."""
    device_wait_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds in which the device computed nothing, by cause (``flexgen_helm.memory.spans.device_waits.WaitCause``)."""
    limit_seconds: float | None = None
    """Least seconds in which this machine could have done the sweep; None: not known."""
    limited_by: str | None = None
    """Resource that needs them, a key of ``RunStats.least_seconds``; None: not known."""

    @property
    def bound_by(self) -> str | None:
        """Resource that was busy longest; None if none was measured."""
        return max(self.busy_seconds, key=self.busy_seconds.__getitem__, default=None)


@dataclass(frozen=True)
class Forecast:
    """What the planner expected of a run before it began (docs/planning.md)."""

    machine: str
    """Name of the profile with which it was computed."""
    seconds: float
    sweeps: int
    peak_bytes: dict[str, int]
    """Most bytes of each tier."""
    bytes_moved: dict[str, int]
    busy_seconds: dict[str, float]

    @property
    def binding(self) -> str:
        """Resource that was expected to be busy longest."""
        return max(self.busy_seconds, key=self.busy_seconds.__getitem__, default="none")


@dataclass
class RunStats:
    """Measurements of one ``Engine.run``."""

    num_jobs: int = 0
    prompt_tokens_asked: int = 0
    """Sum of the prompt lengths of all jobs, as if each were computed alone."""
    prompt_tokens_computed: int = 0
    """Prompt tokens that went through the layers; identical jobs and shared prefixes count once, padding not at all."""
    generated_tokens: int = 0
    sweeps: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    """Highest resident memory of this process in bytes (on a GPU, device memory that torch has taken) during the run; at the
    ends of its sweeps, if this process held more before the run."""
    idle_bytes: int = 0
    """The same when the run began, with the model loaded."""
    tier_peak_bytes: dict[str, int] = field(default_factory=dict)
    """Most bytes that weights, slots, buffers, K and V together held on each tier during the run."""
    bytes_moved: dict[str, int] = field(default_factory=dict)
    """Bytes moved on each of LINKS, and bytes of K and V read by ``cpu_attention``."""
    busy_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds in which each of RESOURCES did at least one thing."""
    limit_seconds: float | None = None
    """Least seconds in which this machine could have done the run, from ``Engine.with_limit``; None: not known."""
    least_seconds: dict[str, float] = field(default_factory=dict)
    """Least seconds that each resource alone would have needed (``flexgen_helm.policy.roofline``)."""
    per_sweep: list[SweepStats] = field(default_factory=list, repr=False)
    """Measurements of each sweep, in order."""
    bytes_saved: dict[str, int] = field(default_factory=dict)
    """Bytes of V that links did not move because sparse attention does not read them; empty without sparse attention."""
    predicted: Forecast | None = None
    """What the planner expected before the run; None: no policy was searched, because everything fits or the user names it."""
    device_wait_seconds: dict[str, float] = field(default_factory=dict)
    """Seconds in which the device computed nothing during sweeps, by cause."""
    limit_unknown: str = "the machine's rates were not asked for"
    """Why ``limit_seconds`` is None; empty where it is known."""

    @property
    def roofline_efficiency(self) -> float | None:
        """Ratio of the limit to the time taken; None: not known."""
        return self.limit_seconds / self.seconds if self.limit_seconds is not None and self.seconds else None

    @property
    def predicted_seconds(self) -> float | None:
        """Seconds that the planner expected; None: it was not asked."""
        return None if self.predicted is None else self.predicted.seconds

    def forecast_text(self) -> str | None:
        """Return predicted against measured in words; None: nothing was predicted."""
        if self.predicted is None or not self.seconds:
            return None
        off = self.predicted.seconds / self.seconds - 1
        return f"{self.predicted.seconds:.3g} s predicted, {abs(off):.1%} {'more' if off > 0 else 'less'} than measured"

    def as_dict(self) -> dict[str, Any]:
        """Return all fields in plain types; of `per_sweep` what bound the sweeps, and how far from their limits they were."""
        bound_by = Counter(sweep.bound_by for sweep in self.per_sweep if sweep.bound_by)
        return asdict(replace(self, per_sweep=[])) | {
            "predicted_seconds": self.predicted_seconds,
            "per_sweep": {"bound_by": dict(bound_by), "limit": _limits(self.per_sweep)},
        }


def _limits(sweeps: Sequence[SweepStats]) -> dict[str, Any] | None:
    """Return limit over time of sweeps: median, quantiles, the worst, and at most ``MOST_SWEEPS`` sweeps; None: unknown."""
    known = [
        (number, sweep.seconds, sweep.limit_seconds, sweep.limited_by)
        for number, sweep in enumerate(sweeps, start=1)
        if sweep.limit_seconds is not None and sweep.seconds
    ]
    if not known:
        return None
    shares = sorted((limit / seconds, number) for number, seconds, limit, _ in known)
    quantiles = {q: round(shares[round(q / 100 * (len(shares) - 1))][0], 4) for q in (10, 25, 50, 75, 90)}
    every = math.ceil(len(known) / MOST_SWEEPS)
    return {
        "median": quantiles.pop(50),
        "worst": round(shares[0][0], 4),
        "worst_sweep": shares[0][1],
        "quantiles": {f"{q}%": share for q, share in quantiles.items()},
        "every": every,
        "sweeps": [[_short(seconds), _short(limit), resource] for _, seconds, limit, resource in known[::every]],
    }


def _short(seconds: float) -> float:
    return float(f"{seconds:.4g}")

"""Linear expressions in the shares of a policy. No torch, no solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from flexgen_helm.types import TIERS, Shares, Tier

What = Literal["weights", "cache", "hidden"]
"""What is divided among the tiers."""


class Share(NamedTuple):
    """A variable: the share of something that is on a tier."""

    what: What
    tier: Tier


@dataclass(frozen=True)
class Linear:
    """``constant`` and a factor for each share."""

    constant: float = 0.0
    factors: Mapping[Share, float] = field(default_factory=dict)

    @classmethod
    def of(cls, what: What, factors: Mapping[Tier, float]) -> Linear:
        """Return the sum of the shares of one thing, each times the factor of its tier."""
        return cls(0.0, {Share(what, tier): factor for tier, factor in factors.items() if factor})

    def __add__(self, other: Linear | float) -> Linear:
        """Return the sum."""
        if not isinstance(other, Linear):
            return Linear(self.constant + other, self.factors)
        names = {*self.factors, *other.factors}
        sums = {name: self.factors.get(name, 0.0) + other.factors.get(name, 0.0) for name in names}
        return Linear(self.constant + other.constant, sums)

    def __mul__(self, factor: float) -> Linear:
        """Return the product with a number."""
        return Linear(self.constant * factor, {name: value * factor for name, value in self.factors.items()})

    def at(self, shares: Mapping[What, Shares]) -> float:
        """Return the value for given shares."""
        return self.constant + sum(shares[what][TIERS.index(tier)] * value for (what, tier), value in self.factors.items())

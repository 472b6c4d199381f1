"""Placement: a tier for each part, so that the realised shares differ from those asked for by at most one part."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.types import TIERS, Shares, Tier


def interleave(sizes: Sequence[int], shares: Shares) -> list[Tier]:
    """Spread parts evenly over the tiers.

    Each part goes to the tier that brings the realised shares closest to those asked for, so that slow parts are never
    neighbours without need (FlexGen section 4.3 shares; its own code places whole tensors by a step function).

    Args:
        sizes: Bytes of each part, such as a layer.
        shares: Shares of the bytes on each tier.

    Returns:
        The tier of each part, in the order of `sizes`.
    """
    placed = dict.fromkeys(TIERS, 0)
    tiers: list[Tier] = []
    total = 0
    for size in sizes:
        total += size
        tier = max(TIERS, key=lambda tier: shares[TIERS.index(tier)] * total - placed[tier])
        placed[tier] += size
        tiers.append(tier)
    return tiers

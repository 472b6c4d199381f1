"""Which part goes to which tier, so that shares are real to within one part."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_helm.types import TIERS, Shares, Tier


def interleave(sizes: Sequence[int], shares: Shares) -> list[Tier]:
    """Spread parts evenly over the tiers, in their order.

    Each part goes where it brings the realised shares closest to those asked for, so that no stretch of layers has all the
    slow ones (FlexGen section 4.3 shares; its own code places whole tensors by a step function).

    Args:
        sizes: Bytes of each part, such as a layer.
        shares: Of the bytes, on each tier.

    Returns:
        The tier of each part.
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

"""Scale and minimum of groups by least squares: ``x ~ code * scale + minimum`` with a minimum of at most 0."""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that the codes span at first."""
ROUNDS = 2
"""Rounds of least squares and rounding for each candidate."""
GROUPS_AT_ONCE = 8192
"""Groups whose intermediate tensors stay in the cache together."""


def fit(groups: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and minimum with the least squared error among those tried.

    Args:
        groups: float32 ``[N, n]``, finite.
        levels: ``[N, 1]``: the largest code of each group.

    Returns:
        Two tensors ``[N, 1]``: scale of at least 0, minimum of at most 0. The scale is 0 for a group of one number that is
        not positive.
    """
    parts = zip(groups.split(GROUPS_AT_ONCE), levels.split(GROUPS_AT_ONCE), strict=True)
    scales, minima = zip(*(_search(*part) for part in parts), strict=True)
    return torch.cat(scales), torch.cat(minima)


def codes_of(groups: Tensor, levels: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Return the nearest codes as float32 ``[N, n]``; 0 where the scale is 0."""
    inverse = torch.where(scale > 0, scale.reciprocal(), 0)
    return torch.minimum(((groups - minimum) * inverse).round_().clamp_(min=0), levels)


def _search(groups: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    # A range that holds 0 or lies below it has a minimum of at most 0.
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_minimum = torch.zeros_like(low), low
    for share in CANDIDATES:
        scale = (high - low) / levels * share
        minimum = ((high + low) / 2 - scale * levels / 2).clamp(max=0)
        for i in range(ROUNDS + 1):
            codes = codes_of(groups, levels, scale, minimum)
            error = (codes * scale + minimum - groups).square_().sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
            if i < ROUNDS:
                scale, minimum = _least_squares(groups, codes, scale, minimum)
    return best_scale, best_minimum


def _least_squares(groups: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best scale and minimum for given codes, or the former ones where the codes determine none."""
    n = groups.shape[1]
    sum_x, sum_q = groups.sum(1, keepdim=True), codes.sum(1, keepdim=True)
    sum_qx, sum_qq = (codes * groups).sum(1, keepdim=True), codes.square().sum(1, keepdim=True)
    determinant = n * sum_qq - sum_q * sum_q
    new_scale = (n * sum_qx - sum_q * sum_x) / determinant
    new_minimum = (sum_x - new_scale * sum_q) / n
    positive = new_minimum > 0
    new_scale = torch.where(positive, sum_qx / sum_qq, new_scale)
    valid = (determinant > 0) & (new_scale > 0)
    return torch.where(valid, new_scale, scale), torch.where(valid, new_minimum.clamp(max=0), minimum)

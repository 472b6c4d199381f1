"""Matrices and sensitivities of their columns for the tests of quantizers."""

from __future__ import annotations

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def make_matrix(rows: int, columns: int, seed: int = 0, outliers: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix ``[rows, columns]`` whose columns spread differently, and how much errors of each matter."""
    chance = torch.Generator().manual_seed(seed)
    spread = torch.rand(columns, generator=chance) + 0.1
    weight = torch.randn(rows, columns, generator=chance) * spread * 0.05
    if outliers:
        places = torch.randint(rows * columns, (outliers,), generator=chance)
        weight.view(-1)[places] = torch.randn(outliers, generator=chance).sign() * 200
    return weight, torch.rand(columns, generator=chance) ** 4


def make_model(shapes: list[tuple[int, int]], outliers: int = 0) -> tuple[Weights, Weights]:
    """Matrices and sensitivities of their columns by name."""
    weights, columns = {}, {}
    for i, shape in enumerate(shapes):
        weights[f"m{i}"], columns[f"m{i}"] = make_matrix(*shape, seed=i, outliers=outliers)
    return weights, columns

"""Mean squares of inputs."""

from __future__ import annotations

import torch

from flexgen_helm.compression.statistics import ColumnStatistics


def test_moment_is_the_mean_square_over_all_tokens() -> None:
    inputs = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    statistics = ColumnStatistics(7)
    for part in inputs.split([20, 0, 30]):
        statistics.add(part)
    assert statistics.num_tokens == 50
    torch.testing.assert_close(statistics.moment, inputs.double().square().mean(0).float())


def test_many_equal_tokens_are_counted_without_loss() -> None:
    """A float32 total of squares of 1 would stay at 2**24."""
    statistics = ColumnStatistics(1)
    statistics.total += 2.0**25
    statistics.num_tokens = 2**25
    statistics.add(torch.ones(3, 1, dtype=torch.bfloat16))
    assert statistics.total.item() == 2**25 + 3
    assert statistics.moment.item() == 1


def test_columns_that_saw_no_token_count_the_same() -> None:
    assert ColumnStatistics(3).moment.tolist() == [1, 1, 1]

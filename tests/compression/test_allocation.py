"""Bits of columns against all possible choices."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.compression.allocation import LADDERS, allocate, column_errors, overhead_bits
from flexgen_helm.compression.minmax import MinMax, dequantize
from flexgen_helm.errors import UnsupportedModel


def spent(widths: list[torch.Tensor], shapes: list[tuple[int, int]]) -> int:
    """Bits that the layout needs: codes of rows filled up to a multiple of 8, and the rest."""
    codes = sum(-(-rows // 8) * 8 * int(w.sum()) for w, (rows, _) in zip(widths, shapes, strict=True))
    return codes + sum(map(overhead_bits, shapes))


def test_scales_and_map_of_a_matrix_are_counted() -> None:
    """576 x 576: 12 bits a group of 64, 32 bits for 16 of them, 2 bits a column, and 32 for the unit."""
    assert overhead_bits((576, 576)) == 12 * 9 * 576 + 32 * 9 * 36 + 2 * 576 + 32


@given(
    st.lists(st.tuples(st.integers(200, 400), st.integers(16, 60)), min_size=1, max_size=4),
    st.sampled_from(sorted(LADDERS)),
    st.integers(0, 1000),
)
@settings(deadline=None)
def test_bits_are_what_was_asked_less_one_widening(shapes: list[tuple[int, int]], bits: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    scores = [torch.rand(columns, dtype=torch.float64, generator=chance) ** 6 for _, columns in shapes]
    ladder, budget = LADDERS[bits], (bits + 0.5) * sum(rows * columns for rows, columns in shapes)
    if spent([torch.full_like(score, ladder[0]) for score in scores], shapes) > budget:
        with pytest.raises(UnsupportedModel, match="need many scales"):
            allocate(scores, shapes, bits)
        return
    widths = allocate(scores, shapes, bits)
    left = budget - spent(widths, shapes)
    assert left >= 0
    assert {int(x) for w in widths for x in w} <= set(ladder)
    widest = max(-(-rows // 8) * 8 for rows, _ in shapes) * max((b - a for a, b in itertools.pairwise(ladder)), default=0)
    assert left < widest or all(bool((w == ladder[-1]).all()) for w in widths)


@given(st.lists(st.floats(1e-6, 1), min_size=8, max_size=8), st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_no_other_choice_with_as_many_bits_has_less_error(values: list[float], more_rows: int) -> None:
    shapes = [(300 + more_rows, 5), (400, 3)]
    scores = list(torch.tensor(values, dtype=torch.float64).split([5, 3]))
    ladder = torch.tensor([4, 5, 6])
    ours = torch.cat(allocate(scores, shapes, 4, ladder.tolist()))
    choices = torch.cat([ours[None], ladder[torch.cartesian_prod(*[torch.arange(3)] * 8)]]).double()
    bits = choices @ torch.tensor([-(-rows // 8) * 8 for rows, columns in shapes for _ in range(columns)], dtype=torch.float64)
    errors = (15 / (2**choices - 1)) ** 2 @ torch.tensor(values, dtype=torch.float64)
    assert errors[0] <= errors[bits <= bits[0]].min() * (1 + 1e-9)


def test_scores_are_the_loss_that_gradients_tell_where_rows_matter_alike() -> None:
    """The loss is ``sum (g_i e_ij x_j)**2`` for signs as gradients, which all rows share, and inputs of one column each."""
    chance = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(128, 6, generator=chance).double(), torch.diag(torch.rand(6, generator=chance)).double()
    gradients = torch.randn(6, 1, generator=chance).double() * torch.randn(6, 128, generator=chance).sign()
    columns = (inputs.square() * gradients.square().sum(1, keepdim=True)).mean(0)
    error = weight - dequantize(MinMax(4).quantize(weight)).double()
    expected = ((inputs @ error.T) * gradients).square().sum(1) / 6
    torch.testing.assert_close(column_errors(weight, columns), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", [torch.zeros(64, 5), torch.ones(64, 5)])
def test_a_matrix_without_sensitivity_or_error_has_no_score(weight: torch.Tensor) -> None:
    assert column_errors(weight, torch.ones(5)).tolist() == [0] * 5
    assert column_errors(weight, torch.zeros(5)).tolist() == [0] * 5


def test_matrices_of_few_rows_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"4\.5 bits per weight.*the shortest has 7\).*w4-minmax"):
        allocate([torch.ones(5)], [(7, 5)], 4)

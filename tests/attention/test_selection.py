"""Which numbers of many are the largest, against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from flexgen_helm.attention import sparse
from flexgen_helm.attention.kernels import NEG_INF
from flexgen_helm.attention.selection import choose_largest
from tests.simulated_gpu.patches import simulated_gpu

NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-45, -1e-45]),
    st.just(float("-inf")),
)


@njit
def _choose_largest(x, wanted, bits):  # type: ignore[no-untyped-def]
    choose_largest(x, wanted, bits)


def chosen(x: np.ndarray, wanted: int) -> np.ndarray:
    """Whether each number is chosen."""
    bits = np.full(len(x) // 32, 7, np.uint32)
    _choose_largest(x, wanted, bits)
    return (bits[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).ravel()


def expected(x: np.ndarray, wanted: int) -> np.ndarray:
    """The same by a stable sort."""
    found = np.zeros(len(x), bool)
    found[np.argsort(-x, kind="stable")[:wanted]] = True
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=96), st.integers(1, 4), st.integers(1, 100))
def test_the_largest_are_chosen_and_of_equal_ones_the_first(some: list[float], repeated: int, percent: int) -> None:
    numbers = np.array((some * repeated)[:96], np.float32)
    x = np.concatenate([numbers, np.full(96 - len(numbers), -np.inf, np.float32)])
    wanted = -(-int((x > -np.inf).sum()) * percent // 100)
    np.testing.assert_array_equal(chosen(x, wanted), expected(x, wanted))


@pytest.mark.parametrize("scale", [1.0, 1e-40, 1e37])
def test_scores_of_many_keys(scale: float) -> None:
    chance = np.random.default_rng(0)
    for n in (128, 1024, 6016):
        x = (chance.standard_normal(n) * scale).astype(np.float32)
        x[chance.random(n) < 0.2] = x[0]
        for wanted in (1, n // 10, n // 2, n):
            np.testing.assert_array_equal(chosen(x, wanted), expected(x, wanted))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_finite_number_does_not_choose_too_many(bad: float) -> None:
    x = np.arange(64, dtype=np.float32)
    x[5:] = bad
    assert chosen(x, 7).sum() <= 7


@pytest.mark.parametrize("percent", [1, 10, 60, 99])
def test_sorting_in_parts_chooses_what_the_compiled_loop_chooses(monkeypatch: pytest.MonkeyPatch, percent: int) -> None:
    """Other devices sort; here a simulated one has the CPU's numbers."""
    table = torch.randint(-6, 6, (7, 3, 2, 128), generator=torch.Generator().manual_seed(percent)).float()
    table[table == -6] = NEG_INF
    table[3] = NEG_INF
    expected = sparse._choose(table, percent)
    monkeypatch.setattr(sparse, "SORTED_AT_ONCE", 2 * table[0].numel())
    with simulated_gpu():
        found = sparse._choose(table.to("cuda"), percent).cpu()
    assert torch.equal(found, expected)

"""Groups against the same search for one group at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.compression.group_kernel import fit_groups, residuals, round_groups

Array = Any
ONE = np.float32(1)


def codes_of(x: Array, levels: float, scale: float, minimum: float) -> Array:
    return np.clip(np.rint((x - minimum) / scale), 0, levels) if scale > 0 else np.zeros_like(x)


def best_error(x: Array, levels: float) -> float:
    """The least squared error over shares of the range and rounds of least squares, by NumPy's solver."""
    low, high, found = min(x.min(), 0.0), x.max(), np.inf
    for share in (1, 0.95, 0.9, 0.85, 0.8):
        scale = (high - low) / levels * share
        minimum = min((high + low) / 2 - scale * levels / 2, 0.0)
        for _ in range(3):
            codes = codes_of(x, levels, scale, minimum)
            found = min(found, float(((codes * scale + minimum - x) ** 2).sum()))
            if np.ptp(codes) == 0:
                break
            new, low_end = np.linalg.lstsq(np.stack([codes, np.ones_like(codes)], 1), x, rcond=None)[0]
            if low_end > 0:
                new, low_end = float(codes @ x / (codes @ codes)), 0.0
            if new <= 0:
                break
            scale, minimum = new, low_end
    return found


def fitted(weight: Array, levels: Array) -> tuple[Array, Array]:
    scale, minimum = np.empty((2, -(-len(weight) // 64), weight.shape[1]), np.float32)
    fit_groups(weight, ONE, levels, scale, minimum)
    return scale, minimum


@given(st.integers(1, 150), st.integers(1, 70), st.sampled_from([3.0, 15.0, 255.0]), st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_the_error_is_that_of_the_search_in_float64(rows: int, columns: int, most: float, shift: float) -> None:
    weight = (np.random.default_rng(rows * columns).standard_normal((rows, columns)) + shift).astype(np.float32)
    levels = np.full(columns, most, np.float32)
    scale, minimum = fitted(weight, levels)
    assert (scale >= 0).all()
    assert (minimum <= 0).all()
    means, errors = np.empty((2, *scale.shape), np.float32)
    residuals(weight, ONE, levels, scale, minimum, means, errors)
    codes = np.empty(weight.shape, np.uint8)
    round_groups(weight, ONE, levels, scale, minimum, codes)
    for b in range(len(scale)):
        for c in range(columns):
            x, own = weight[b * 64 : b * 64 + 64, c].astype(float), codes[b * 64 : b * 64 + 64, c]
            # Where rounding falls the other way in float32, the search may go on elsewhere.
            noise = 1e-5 * float(x @ x)
            assert errors[b, c] <= best_error(x, most) * 1.02 + noise
            rest = own * float(scale[b, c]) + float(minimum[b, c]) - x
            assert errors[b, c] == pytest.approx(float(rest @ rest), rel=1e-3, abs=noise)
            assert means[b, c] == pytest.approx((x - own * float(scale[b, c])).mean(), rel=1e-4, abs=1e-4)


def test_codes_are_the_nearest_and_weights_are_multiplied_first() -> None:
    weight = np.array([[-1.0, 0.0, 9.0], [0.3, 0.5, 2.0]], np.float32)
    codes = np.empty((2, 3), np.uint8)
    scale, minimum = np.array([[1, 0, 1]], np.float32), np.array([[-2, 0, 0]], np.float32)
    round_groups(weight, np.float32(2), np.full(3, 15, np.float32), scale, minimum, codes)
    assert codes.tolist() == [[0, 0, 15], [3, 0, 4]]


def test_a_group_of_one_number() -> None:
    weight = np.array([[0.0, -3.0, 3.0]] * 5, np.float32)
    levels = np.full(3, 15, np.float32)
    scale, minimum = fitted(weight, levels)
    means, errors = np.empty((2, *scale.shape), np.float32)
    residuals(weight, ONE, levels, scale, minimum, means, errors)
    assert errors == pytest.approx(np.zeros((1, 3)), abs=1e-9)

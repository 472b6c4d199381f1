"""The entropy-coded quantizer against a plain computation in float64."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression.entropy import Coded, Columns, StepRule, bits, dequantize, quantize_columns, solve_columns
from flexgen_helm.errors import PolicyError, UnsupportedModel
from tests.compression.matrices import make_matrix, make_model

SHAPES = [(192, 64), (64, 192), (128, 96)]


def entropy_of(coded: list[Coded]) -> float:
    """The bits a weight, counted in plain Python as the module's docstrings say."""
    symbols: dict[int, Counter[int]] = {}
    for x in coded:
        for column, of_class in zip(x.integers.T.tolist(), x.classes.tolist(), strict=True):
            symbols.setdefault(of_class, Counter()).update(column)
    code = -sum(n * math.log2(n / counts.total()) for counts in symbols.values() for n in counts.values())
    columns, exceptions = sum(len(x.steps) for x in coded), sum(len(x.places) for x in coded)
    return (code * 1.015 + columns * (16 + 6) + exceptions * (64 + 32)) / sum(x.integers.numel() for x in coded)


def quantize(weight: Tensor, columns: Tensor, rule: StepRule, name: str = "A matrix") -> Coded:
    """Quantises a matrix."""
    weight = weight.float()
    return quantize_columns(weight, Columns.of(name, weight, columns), rule)


def solve(weights: Mapping[str, Tensor], columns: Mapping[str, Tensor], asked: float) -> StepRule:
    """Finds the steps of a model."""
    return solve_columns(weights, [Columns.of(name, weight, columns[name]) for name, weight in weights.items()], asked)


def steps_of(name: str, weights: Mapping[str, Tensor], columns: Mapping[str, Tensor], factor: float) -> Tensor:
    """The steps of a matrix by the formula of the module, float64, of a model with an odd number of matrices."""
    scales = {each: float(columns[each].double().mean()) / len(weight) for each, weight in weights.items()}
    median = sorted(scales.values())[len(scales) // 2]
    own = columns[name].double()
    coarser: Tensor = torch.maximum(own / own.mean(), torch.tensor(0.25)) ** -0.45
    between: float = (scales[name] / median) ** -0.45
    return coarser * factor * between


def test_steps_follow_the_formula_and_integers_round_to_the_nearest() -> None:
    weights, columns = make_model(SHAPES)
    rule = solve(weights, columns, 4.5)
    for name, weight in weights.items():
        coded = quantize(weight, columns[name], rule)
        steps = steps_of(name, weights, columns, rule.factor)
        # Steps have the 11 digits of fp16, so only integers near a half can differ.
        exact = weight.double() / steps
        near = (exact - exact.floor() - 0.5).abs() < 2**-10 * exact.abs()
        assert torch.equal(coded.integers[~near].double(), exact.round()[~near])
        assert float(near.float().mean()) < 0.05


def test_stored_steps_are_those_of_least_squares() -> None:
    weight, sensitivity = make_matrix(200, 50)
    coded = quantize(weight, sensitivity, StepRule(0.02, 1.0))
    for j in range(50):
        z = coded.integers[:, j : j + 1].double()
        best = torch.linalg.lstsq(z, weight[:, j : j + 1].double()).solution.item()
        assert float(coded.steps[j]) == pytest.approx(best, rel=2**-11)


@pytest.mark.parametrize("asked", [3.0, 4.5, 6.0])
def test_a_model_takes_the_bits_that_are_asked(asked: float) -> None:
    weights, columns = make_model([(256, 64), (512, 32), (300, 100)], outliers=1)
    rule = solve(weights, columns, asked)
    coded = [quantize(weight, columns[name], rule) for name, weight in weights.items()]
    assert bits(coded) == pytest.approx(entropy_of(coded), rel=1e-12)
    # The smallest change of such a small model is one more integer of another value.
    assert asked - 3e-3 <= entropy_of(coded) <= asked


def test_weights_are_read_a_matrix_at_a_time() -> None:
    weights, columns = make_model(SHAPES)

    class Loaded(Mapping[str, Tensor]):
        reads = 0

        def __getitem__(self, name: str) -> Tensor:
            self.reads += 1
            return weights[name].clone()

        def __iter__(self) -> Iterator[str]:
            return iter(weights)

        def __len__(self) -> int:
            return len(weights)

    loaded = Loaded()
    assert solve(loaded, columns, 4.5) == solve(weights, columns, 4.5)
    assert loaded.reads <= 15 * len(weights)


@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from(["zero", "constant", "one zero column", "random", "tiny", "outlier"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.floats(1e-4, 1.0),
)
@settings(max_examples=80, deadline=None)
def test_any_matrix_comes_back_within_half_a_step(
    rows: int, columns: int, kind: str, dtype: torch.dtype, factor: float
) -> None:
    weight, sensitivity = make_matrix(rows, columns)
    if kind == "zero":
        weight, sensitivity = weight * 0, sensitivity * 0
    elif kind == "constant":
        weight = torch.full_like(weight, 0.37)
    elif kind == "one zero column":
        weight[:, 0] = 0
    elif kind == "tiny":
        weight *= 1e-7
    elif kind == "outlier":
        weight[0, 0] = 100.0
    weight = weight.to(dtype)
    rule = StepRule(factor, max(1e-30, float(sensitivity.double().mean()) / rows))
    coded = quantize(weight, sensitivity, rule)
    weight, steps = weight.double(), Columns.of("", weight.float(), sensitivity).steps(rule).double()
    exact = coded.integers.double()
    exact.view(-1)[coded.places] = coded.values.double()
    assert bool(((exact * steps - weight).abs() <= steps / 2 * (1 + 2**-20)).all())
    assert bool((exact.abs().view(-1)[coded.places] > 127).all())
    found = dequantize(coded)
    assert torch.equal(found, (exact * coded.steps.double()).float())
    # Fitted steps lose no more than those of rounding, but for their own rounding to fp16.
    rounding = (coded.steps.double() * 2**-11 + 2**-25).square() * exact.square().sum(0)
    assert bool(((found - weight).square().sum(0) <= (exact * steps - weight).square().sum(0) + rounding + 1e-12).all())
    # No column vanishes whose weights are within the reach of fp16 steps.
    assert bool(exact.any(0)[weight.abs().amax(0) > 2.0**-20].all())


def test_integers_beyond_int8_are_kept() -> None:
    weight, sensitivity = make_matrix(64, 32, outliers=5)
    coded = quantize(weight, sensitivity, StepRule(0.02, float(sensitivity.mean()) / 64))
    assert 0 < len(coded.places) <= 5
    at = coded.places
    torch.testing.assert_close(dequantize(coded).view(-1)[at], weight.view(-1)[at], rtol=1e-2, atol=0)


def test_what_has_no_step_is_refused_by_name() -> None:
    weight, sensitivity = make_matrix(8, 4)
    for bad in (math.nan, math.inf):
        broken = weight.clone()
        broken[3, 2] = bad
        with pytest.raises(UnsupportedModel, match=r"layers\.3\.up_proj holds NaN or infinite"):
            solve({"layers.3.up_proj": broken}, {"layers.3.up_proj": sensitivity}, 4.5)
    with pytest.raises(UnsupportedModel, match=r"inputs of layers\.4 are NaN"):
        solve({"layers.4": weight}, {"layers.4": sensitivity * math.nan}, 4.5)
    with pytest.raises(UnsupportedModel, match=r"layers\.5 has shape \[8, 4\]"):
        solve({"layers.5": weight}, {"layers.5": sensitivity[1:]}, 4.5)
    with pytest.raises(UnsupportedModel, match=r"layers\.6 has a weight of 1e\+30"):
        quantize(torch.full((4, 4), 1e30), torch.ones(4), StepRule(1.0, 1.0), "layers.6")


def test_bits_that_cannot_be_reached_are_refused() -> None:
    weights, columns = make_model([(4, 8)])
    # Four weights a column, and 22 bits of its own.
    with pytest.raises(PolicyError, match=r"4\.5 bits a weight are too few.*22 bits"):
        solve(weights, columns, 4.5)
    for asked in (0, -1, 9, math.nan):
        with pytest.raises(PolicyError, match="8 at most"):
            solve(weights, columns, asked)


def test_a_model_of_zeros_is_served() -> None:
    weight = torch.zeros(32, 8)
    coded = quantize(weight, torch.zeros(8), solve({"a": weight}, {"a": torch.zeros(8)}, 4.5))
    assert not bool(dequantize(coded).any())
    assert bits([coded]) == 22 / 32


def test_sensitive_columns_have_smaller_errors() -> None:
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=chance)
    sensitivity = torch.cat([torch.ones(32), torch.full((32,), 100.0)])
    coded = quantize(weight, sensitivity, solve({"a": weight}, {"a": sensitivity}, 4.5))
    error = (dequantize(coded) - weight).square().mean(0)
    # Ratio of the steps by the formula: (1.98 / 0.25) ** 0.45, squared in the errors.
    assert float(error[:32].mean() / error[32:].mean()) == pytest.approx((100 / 50.5 / 0.25) ** 0.9, rel=0.1)

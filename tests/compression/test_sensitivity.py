"""Steps that know the output: their statistics and their formula, against plain computations in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexgen_helm.compression.coding import encode
from flexgen_helm.compression.entropy import StepRule, bits, dequantize, row_factors
from flexgen_helm.compression.sensitivity import (
    Sensitivity,
    SensitivityStatistics,
    classes_of_rows,
    probe,
    quantize,
    solve_steps,
)
from flexgen_helm.errors import UnsupportedModel
from tests.compression.matrices import Weights, make_model

SHAPES = [(192, 64), (64, 192), (128, 96)]


def make_sensitivities(weights: Weights, moments: Weights) -> dict[str, Sensitivity]:
    chance = torch.Generator().manual_seed(1)
    scales = (torch.rand(len(weights), generator=chance) * 3).exp()
    return {
        name: Sensitivity(moments[name] * scale, (torch.randn(len(weights[name]), generator=chance) * 2).exp())
        for name, scale in zip(weights, scales, strict=True)
    }


def steps_of(name: str, weights: Weights, known: dict[str, Sensitivity], factor: float) -> tuple[Tensor, Tensor]:
    """Steps ``[in]`` before factors of rows, and these ``[out]``, by the formula of the module, float64."""
    means = {each: float(known[each].columns.double().mean()) / len(weights[each]) for each in weights}
    median = sorted(means.values())[len(means) // 2]
    columns, rows = known[name].columns.double(), known[name].rows.double()
    finer = torch.maximum(columns / columns.mean(), torch.tensor(0.25)) ** -0.45 * (means[name] / median) ** -0.45
    exact: Tensor = (rows / rows.mean()).clamp(0.03, 30) ** -0.3
    return finer * factor, 2 ** (torch.round(exact.log2() * 4) / 4)


def test_steps_follow_the_formula_and_weights_come_back_within_half_of_them() -> None:
    weights, moments = make_model(SHAPES)
    known = make_sensitivities(weights, moments)
    rule = solve_steps(weights, known, 4.5)
    for name, weight in weights.items():
        coded = quantize(weight, known[name], rule)
        columns, rows = steps_of(name, weights, known, rule.factor)
        torch.testing.assert_close(row_factors(coded.row_classes).double(), rows, rtol=1e-6, atol=0)
        # A column has no coarser step than its largest weight.
        largest = (weight.double() / rows[:, None]).abs().amax(0)
        steps = torch.minimum(columns, largest) * rows[:, None]
        integers = coded.integers.double()
        integers.view(-1)[coded.places] = coded.values.double()
        error = (integers * steps - weight.double()).abs() / steps
        # Steps have the 11 digits of fp16.
        assert bool((error <= 0.5 + 2**-11 * (integers.abs() + 0.5) + 1e-6).all())
        fitted = (dequantize(coded).double() / rows[:, None] - weight / rows[:, None]).square().sum(0)
        rounded = (integers * torch.minimum(columns, largest) - weight / rows[:, None]).square().sum(0)
        assert bool((fitted <= rounded * 1.01 + 1e-9).all())


@pytest.mark.parametrize("asked", [3.0, 4.5, 6.0])
def test_a_model_takes_the_bits_that_are_asked(asked: float) -> None:
    weights, moments = make_model([(256, 64), (512, 32), (300, 100)], outliers=1)
    known = make_sensitivities(weights, moments)
    rule = solve_steps(weights, known, asked)
    coded = [quantize(weight, known[name], rule) for name, weight in weights.items()]
    assert asked - 3e-3 <= bits(coded) <= asked
    # A byte for each row is counted, and stored.
    factors = 8 * (256 + 512 + 300) / sum(x.integers.numel() for x in coded)
    without = [replace(x, row_classes=x.row_classes[:0]) for x in coded]
    assert bits(coded) - bits(without) == pytest.approx(factors)
    assert all(encode(x).num_bytes - encode(y).num_bytes == len(x.integers) for x, y in zip(coded, without, strict=True))


def test_statistics_are_means_of_products_over_tokens() -> None:
    chance = torch.Generator().manual_seed(0)
    inputs, gradients = torch.randn(30, 5, generator=chance), torch.randn(30, 7, generator=chance)
    statistics = SensitivityStatistics(5, 7)
    for part in range(0, 30, 8):
        statistics.add(inputs[part : part + 8].half(), gradients[part : part + 8])
    # An expert that saw 30 of 60 tokens matters for these alone.
    found = statistics.mean(60)
    inputs = inputs.half()
    columns = [sum(float(g @ g) * float(x[j]) ** 2 for x, g in zip(inputs, gradients, strict=True)) / 60 for j in range(5)]
    rows = [sum(float(g[i]) ** 2 for g in gradients) / 60 for i in range(7)]
    torch.testing.assert_close(found.columns, torch.tensor(columns), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.rows, torch.tensor(rows), rtol=1e-5, atol=0)


def test_gradients_of_probes_tell_the_relative_error_of_the_output() -> None:
    """For a layer with a gate: mean over errors of the output's relative square error, by trying errors."""
    chance = torch.Generator().manual_seed(0)
    tokens, width = 400, 6
    inputs, gate, out = (torch.randn(n, width, generator=chance) for n in (tokens, width, width))
    weight = torch.randn(width, width, generator=chance)

    def layer(weight: Tensor) -> tuple[Tensor, Tensor]:
        middle = inputs @ weight.T
        return middle, inputs + (middle * (inputs @ gate.T).sigmoid()) @ out.T

    statistics = SensitivityStatistics(width, width)
    for _ in range(40):
        middle, hidden = layer(weight.clone().requires_grad_())
        (gradient,) = torch.autograd.grad((hidden * probe(hidden, chance)).sum(), middle)
        statistics.add(inputs, gradient)
    found = statistics.mean(statistics.num_tokens)
    exact = layer(weight)[1]

    def loss(size: Tensor) -> float:
        tried = []
        for _ in range(300):
            error = layer(weight + torch.randn(width, width, generator=chance) * size)[1] - exact
            tried.append(float((error.square().sum(1) / exact.square().sum(1)).mean()))
        return sum(tried) / len(tried)

    for j in range(width):
        assert loss(torch.eye(width)[j].expand(width, width)) == pytest.approx(float(found.columns[j]), rel=0.2)
        one_row = torch.zeros(width, width)
        one_row[j] = 1
        expected = loss(one_row) / sum(loss(torch.eye(width)[i][:, None].expand(width, width)) for i in range(width))
        assert float(found.rows[j] / found.rows.sum()) == pytest.approx(expected, rel=0.35)


def test_factors_are_quarters_of_octaves() -> None:
    classes = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** ((c - 128) / 4) for c in range(256)], dtype=torch.float64).float()
    torch.testing.assert_close(row_factors(classes), expected, rtol=2**-23, atol=0)
    assert float(row_factors(torch.tensor([128], dtype=torch.uint8))) == 1


@given(st.integers(1, 30), st.integers(1, 20), st.sampled_from(["zero", "one row", "all", "huge"]), st.floats(1e-4, 1.0))
@settings(max_examples=60, deadline=None)
def test_any_sensitivity_serves(rows: int, columns: int, kind: str, factor: float) -> None:
    chance = torch.Generator().manual_seed(0)
    weight, known = torch.randn(rows, columns, generator=chance), torch.rand(rows, generator=chance)
    if kind == "zero":
        known = known * 0
    elif kind == "one row":
        known[1:] = 0
    elif kind == "huge":
        known *= 1e30
    of_columns = torch.rand(columns, generator=chance) * (kind != "zero")
    coded = quantize(weight, Sensitivity(of_columns, known), StepRule(factor, 1.0))
    factors = row_factors(coded.row_classes)
    assert bool(((factors >= 0.35) & (factors <= 3)).all())
    error = (dequantize(coded) - weight).abs() / factors[:, None]
    assert bool((error <= (weight / factors[:, None]).abs().amax(0)).all())
    assert kind != "zero" or bool((coded.row_classes == 128).all())


def test_what_is_no_statistic_is_refused() -> None:
    weight = torch.ones(4, 3)
    for rows in (torch.full((4,), math.nan), torch.full((4,), -1.0), torch.ones(3)):
        with pytest.raises(UnsupportedModel):
            quantize(weight, Sensitivity(torch.ones(3), rows), StepRule(0.1, 1.0))
    assert classes_of_rows(torch.tensor([1.0, 1.0])).tolist() == [128, 128]
